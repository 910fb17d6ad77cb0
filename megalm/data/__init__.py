"""Raw text to tokens on disk to deterministic, resumable batches.

    text (jsonl, jsonl.gz, txt, folders)
      -> sources      streams of documents, in units of work
      -> tokenizer    ids
      -> prepare      shards written by the C++ builder (Megatron's .bin/.idx) and a manifest.json
      -> order        sample index -> source and rank (blend) -> pieces of its text (mode)
      -> loader       micro-batches; on the way there, fim rearranges documents

`open` puts these together as a run's config wants them, `needs` counts what the run takes of each source, `trace`
proves which samples it saw.

Nothing here imports torch.
"""
