"""The page: a question in a form or in the address, its answer as figures and pictures. Gradio serves it."""
