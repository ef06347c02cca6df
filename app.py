"""The page as a Space: Hugging Face starts this file. docs/web.md says what the Space's README must hold."""

import os

from hfvram.show.web.server import serve

if __name__ == "__main__":
    serve("0.0.0.0", int(os.environ.get("PORT", "7860")), browser=False)
