"""Raw text to tokens on disk to deterministic, resumable batches.

    text (jsonl, jsonl.gz, txt, folders)
      -> curation     less repetition, better quality, where wanted: text again
      -> sources      streams of documents, in units of work
      -> tokenizer    ids
      -> prepare      shards written by the C++ builder (Megatron's .bin/.idx) and a manifest.json
      -> order        sample index -> place in the shards: arithmetic, no tables
      -> loader       micro-batches

Nothing here imports torch.
"""
