"""Raw text to tokens on disk to deterministic, resumable batches.

    text (jsonl, also compressed, parquet, txt, folders)
      -> curation     less repetition, better quality, where wanted: text again
      -> sources      streams of documents, in units of work (parquet)
      -> tokenizer    ids (tiktoken_file); faster, and the same, by engine
      -> shards       a unit's .bin/.idx, Megatron's format, by the C++ builder
      -> prepare      all units (workers, share), resumable (work, locks), and a manifest.json
      -> order        sample index -> place in the shards: arithmetic, no tables
      -> loader       micro-batches

Nothing here imports torch.
"""
