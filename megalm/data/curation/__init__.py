"""Makes text better before it is tokenized: `megalm data dedup` and `megalm data filter`.

    documents       whole records of a unit of work, so that what is kept is kept with all its keys
    parts           units -> worker processes -> part-K.jsonl of a new directory, and what was counted
    words           the words of a text and hashes of their n-grams
    dedup           removes documents that repeat another; minhash finds those that almost do
    filters         removes documents by rules: quality, decontaminate, language; `rules` is what a user writes

Nothing in memory grows with the text, and the output follows from the inputs alone, not from the number of workers.
"""
