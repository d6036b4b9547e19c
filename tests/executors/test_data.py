"""Batches depend on (seed, step, sequence) alone, so that layouts can be compared."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from forerun.executors import data
from forerun.executors.context_parallel import Borders, as_borders
from forerun.lengths import Lengths
from forerun.mesh import Mesh
from forerun.plan import Phase, Stage
from forerun.workload import Workload

CORPUS = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)


def phase(dp: int, micro_batch_seqs: int, num_microbatches: int) -> Phase:
    return Phase(
        steps=1,
        seq_tokens=31,
        micro_batch_seqs=micro_batch_seqs,
        num_microbatches=num_microbatches,
        mesh=Mesh(dp_replicate=dp),
        stages=(Stage(pool="p", layers=(0, 0)),),
    )


def global_batch(dp: int, micro_batch_seqs: int, num_microbatches: int, step: int) -> torch.Tensor:
    shape = phase(dp, micro_batch_seqs, num_microbatches)
    return torch.cat([data.batch(CORPUS, 7, step, shape, rank) for rank in range(dp)])


def test_global_batch_is_the_same_in_every_layout() -> None:
    alone = global_batch(1, 8, 1, step=3)
    assert alone.shape == (8, 32) and alone.dtype == torch.int64
    for dp, micro, num in ((2, 4, 1), (2, 1, 4), (4, 1, 2), (8, 1, 1)):
        assert torch.equal(global_batch(dp, micro, num, step=3), alone)


def test_steps_and_seeds_draw_other_text() -> None:
    one = data.batch(CORPUS, 0, 0, phase(1, 4, 1), 0)
    assert not torch.equal(one, data.batch(CORPUS, 0, 1, phase(1, 4, 1), 0))
    assert not torch.equal(one, data.batch(CORPUS, 1, 0, phase(1, 4, 1), 0))
    assert torch.equal(one, data.batch(CORPUS, 0, 0, phase(1, 4, 1), 0))


def test_sequences_are_stretches_of_the_corpus() -> None:
    text = CORPUS.tobytes()
    for row in data.batch(CORPUS, 0, 0, phase(1, 4, 1), 0):
        assert bytes(row.tolist()) in text


def test_corpus_as_long_as_a_sequence_is_used_whole() -> None:
    row = data.sequence(CORPUS[:32], 0, 0, 0, 32)
    assert row.tolist() == CORPUS[:32].tolist()


def test_mapped_file_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "corpus.bin"
    path.write_bytes(CORPUS.tobytes())
    mapped = data.open_corpus(path)
    assert torch.equal(
        data.batch(mapped, 0, 0, phase(1, 2, 1), 0), data.batch(CORPUS, 0, 0, phase(1, 2, 1), 0)
    )


LENGTHS = Lengths.of("some", [3, 5, 11, 40], "typed in")


def packed(dp: int, micro_batch_seqs: int, num_microbatches: int, rank: int = 0) -> data.Rows:
    shape = phase(dp, micro_batch_seqs, num_microbatches)
    workload = Workload(seq_tokens=31, global_batch_seqs=8, seed=7, lengths=LENGTHS)
    return data.packed_batch(CORPUS, workload, 3, shape, rank)


def borders_of(rows: data.Rows) -> Borders:
    assert rows.documents_BN is not None
    return as_borders(rows.documents_BN)


def test_packed_documents_are_the_same_in_every_layout() -> None:
    alone = packed(1, 8, 1)
    for dp, micro, num in ((2, 4, 1), (4, 1, 2)):
        ranks = [packed(dp, micro, num, rank) for rank in range(dp)]
        assert torch.equal(torch.cat([rows.inputs_BS for rows in ranks]), alone.inputs_BS)
        assert torch.equal(torch.cat([rows.targets_BS for rows in ranks]), alone.targets_BS)
        borders = [b for rows in ranks for b in borders_of(rows)]
        assert borders == list(borders_of(alone))


def test_a_packed_document_is_a_stretch_with_the_token_after_it() -> None:
    rows, text = packed(1, 8, 1), CORPUS.tobytes()
    every = zip(rows.inputs_BS, rows.targets_BS, borders_of(rows), strict=True)
    lengths: list[int] = []
    for x, y, ends in every:
        assert ends[0] == 0 and ends[-1] == 31
        for start, end in pairwise(ends):
            document = [*x[start:end].tolist(), int(y[end - 1])]
            assert bytes(document) in text and y[start:end].tolist() == document[1:]
            lengths.append(end - start)
    assert len(set(lengths)) > 3 and max(lengths) <= 31
