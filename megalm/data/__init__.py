"""Raw text to tokens on disk to deterministic, resumable batches.

    text (jsonl, also compressed, parquet, txt, folders)
      -> curation     less repetition, better quality, where wanted: text again
      -> sources      streams of documents, in units of work (parquet)
      -> tokenizer    ids (tiktoken_file); faster, and the same, by engine
      -> shards       a unit's .bin/.idx, Megatron's format, by the C++ builder
      -> prepare      all units (workers, share), resumable (work, locks), and a manifest.json
      -> order        sample index -> source and rank (blend) -> pieces of its text (mode)
      -> loader       micro-batches; on the way there, fim rearranges documents

`open` puts these together as a run's config wants them, `needs` counts what the run takes of each source, `trace`
proves which samples it saw.

Nothing here imports torch.
"""
