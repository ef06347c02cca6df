"""Training by formula: a tape without values, on which layers are written as transformers writes them.

- `tensors`: a `Tensor` has shape, strides, dtype and a `Storage`; a storage is freed when Python forgets it, so that
  `del`, rebinding a name and leaving a function free memory exactly where the real code does.
- `tape`: `Tape.new` allocates; `record` and `keep` leave a node with what it saves; `backward` runs the graph as
  PyTorch's engine does; `checkpoint` runs a stretch that is computed again.
- `operators`, `scaled_dot_product`: PyTorch's operators, each with its gradient.
- `blocks`, `rotary`, `attention`, `feed_forward`, `decoder`: layers and models, in the words of their code. `mixture`,
  `routing`: mixtures of experts, over the operators of `selection`; `latent`: latent attention.
- `bert`, `encoder`: encoders' layers and embeddings, and their pass up to a masked language model's loss.
- `state_space`: layers with a state; `selective_scan` and `chunk_scan`, the fused kernels of Mamba and Mamba-2;
  `mamba`: a mixer piece by piece; `selective_scan_fallback`, `chunk_scan_fallback`: without kernels;
  `short_convolution`: LFM2's.
- `t5`, `seq2seq`: an encoder with a decoder that attends to it, each with leaves of its own (`States.encoder`).
- `adapters`, `packed`, `wrapped`: LoRA around layers, quantized ones, and parameters that are none.
- `states`, `step`: parameters as leaves, clipping, optimizers. `stretch`: repeated layers are written five times.
- `data_parallel`: what happens around layers on several GPUs; `fsdp`, `ddp`, `zero` (with
  `deepspeed`, its defaults): what it is.
- `collectives`: what tensor parallel ranks tell each other within a layer.
- `train`: two steps; `timeline(architecture, request)` is the entrance.

A new kind of layer is a function `(t: Tape, part, w: Weights, x: Tensor, around: Surroundings) -> Tensor` that reads
like its `forward`: weights come from `w` in the order in which the code calls them (`w.linear(t, x, tag)`, `w.take()`),
every tensor has a `Tag` with its formula, names are bound and dropped as in the original. Call it in
`decoder.run_layer`. A new operator is a function in `operators` that records a node *before* it allocates (a checkpoint
stops there), saves only what a gradient needs, and whose gradient returns one entry for each input. Then compare with
the exact engine event by event (`tests/test_memory_training_train.py` does), on a model of a few layers, with and
without checkpointing, in fp32 and bf16. What has no formula raises `blocks.unknown`: never a guess.

Symbols: b sequences of s tokens, h hidden size, a heads of d, a_kv KV heads, f feed-forward width, V vocabulary,
e bytes.
"""
