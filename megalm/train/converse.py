"""`megalm generate --interactive`: a text that a person and the model write in turn.

    line -> its tokens are added to the document -> the model reads these alone, as it has kept the rest, and goes on

An end of the document, or an empty line, starts another one. Rank 0 has the terminal and sends each line to the others;
while it waits it sends word that it is there, so that no one's patience, `run.timeout`, ends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TextIO

import torch
import torch.distributed as dist

from megalm.train.generate import Document, Sampling, document, encode_prompt, write
from megalm.train.trained import TrainedModel

WAITING, ENDED = -1, -2


class Conversation:
    """A document that grows in turns."""

    def __init__(self, trained: TrainedModel, sampling: Sampling) -> None:
        self.trained, self.sampling = trained, sampling
        self._document: Document = document(0, [], sampling.seed)

    def go_on(self, line: str) -> Iterator[str]:
        """What the model writes after `line`, piece by piece. Raises UserError if it has no positions for it, and then
        starts anew."""
        if not line:
            self._anew()
            return
        length = len(self._document.tokens)
        try:
            tokens = encode_prompt(self.trained.saved, "the text", line, self.sampling.max_new_tokens, length)
        except BaseException:
            self._anew()
            raise
        self._document.tokens += tokens
        for piece in write(self.trained.passes, self.trained.tokenizer, [self._document], self.sampling):
            yield piece.text
            if piece.end == "end":
                self._anew()

    def _anew(self) -> None:
        self._document = document(0, [], self.sampling.seed)


def shared_lines(file: TextIO, trained: TrainedModel) -> Iterator[str]:
    """The lines of rank 0's `file`, without their ends, on all ranks."""
    mesh, patience = trained.passes.mesh, trained.config.run.timeout / 4
    group = mesh.world.group
    if group is None:
        yield from (line.rstrip("\n") for line in file)
        return
    lines: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in file:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    if mesh.rank == 0:
        threading.Thread(target=listen, daemon=True).start()
    while True:
        content, size = b"", torch.tensor(WAITING, device=mesh.device)
        if mesh.rank == 0:
            try:
                line = lines.get(timeout=patience)
                content = (line or "").encode(errors="surrogateescape")
                size.fill_(ENDED if line is None else len(content))
            except queue.Empty:
                pass
        dist.broadcast(size, 0, group=group)
        if size == ENDED:
            return
        if size != WAITING:
            data = torch.tensor(list(content) or [0] * int(size), dtype=torch.uint8, device=mesh.device)
            dist.broadcast(data, 0, group=group)
            yield bytes(data.tolist()).decode(errors="surrogateescape")
