"""Training between its steps: checkpoints, what is resumed from, metrics, the end. One rank."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist

from forerun import InputError, Plan, PlanFile, RunFailed, document
from forerun.executors import data, job, machine
from forerun.executors.build import build
from forerun.executors.checkpoints import folder, writer
from forerun.executors.checkpoints.folder import Checkpoint
from forerun.executors.trainer import Trainer
from forerun.executors.training import Keeper

replace = msgspec.structs.replace
TEXT = bytes(range(256)) * 20


@pytest.fixture(scope="module")
def group(one_rank: None) -> Iterator[dist.ProcessGroup]:
    """A group of this process, as checkpoints have their own."""
    made = dist.new_group(backend="gloo")
    assert isinstance(made, dist.ProcessGroup)
    yield made


class Rank:
    """The only rank of a training run."""

    def __init__(
        self, plan: Plan, group: Any, place: Path, steps: int | None = 6, **ask: Any
    ) -> None:
        training = job.Training(**{"checkpoint": str(place / "checkpoints"), "every": 2} | ask)
        place.mkdir(exist_ok=True)
        self.plan, self.place = plan, place
        self.trainer: Trainer = build(plan, device=torch.device("cpu"))
        work = job.Job(plan=plan, device="cpu", warmup_steps=0, steps=steps, training=training,
                       data_digest="text")  # fmt: skip
        self.keeper = Keeper(work, self.trainer, job.Progress(place, 0), group)
        self.first = self.keeper.resume(lambda: None)

    def train(self, until: int = 100, wish: Callable[[int], bool] = lambda step: False) -> Any:
        """Steps to the end, or to before step `until`; the reason it ended for."""
        corpus = data.np.frombuffer(TEXT, dtype=data.np.uint8)
        for step in range(self.first, until):
            batch = data.batch(corpus, self.plan.workload.seed, step, self.plan.phase, 0)
            loss = self.trainer.global_loss(self.trainer.forward_backward(batch))
            self.trainer.optimizer_step()
            reason = self.keeper.after_step(step + 1, loss, 0.1, (wish(step + 1), False))
            if reason is not None:
                return reason
        return None

    def finish(self) -> job.End:
        """Steps to the end, with the last checkpoint on disk."""
        self.train()
        return self.keeper.finish()

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.clone() for name, p in self.trainer.named_parameters_full().items()}

    @property
    def notes(self) -> list[str]:
        path = self.place / job.PROGRESS
        lines = path.read_text().splitlines() if path.exists() else []
        return [said["note"] for said in map(json.loads, lines) if isinstance(said, dict)]


@pytest.fixture
def plan(plan_file: PlanFile) -> Plan:
    """One process, a step of two sequences."""
    plan = plan_file.plan
    pool = replace(plan.cluster.pools[0], devices_per_node=1)
    phase = replace(plan.phase, mesh=replace(plan.phase.mesh, dp_replicate=1))
    return replace(
        plan,
        cluster=replace(plan.cluster, pools=(pool,)),
        workload=replace(plan.workload, global_batch_seqs=2),
        phases=(phase,),
    )


def kept(place: Path) -> list[int]:
    return folder.steps(place / "checkpoints")


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resumed_curve_parameters_and_metrics_are_those_of_one_run(
    plan: Plan, group: Any, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    once = Rank(plan, group, tmp_path / "once", metrics=str(metrics))
    assert once.train() == "steps"
    end = once.keeper.finish()
    assert (end.step, end.checkpoint) == (6, str(tmp_path / "once/checkpoints/step-00000006"))
    assert kept(tmp_path / "once") == [6, 4, 2]
    expected = [(row["step"], row["loss"], row["tokens_per_s"]) for row in rows(metrics)]

    first = Rank(plan, group, tmp_path / "twice", metrics=str(metrics))
    first.train(until=5)  # one step beyond the checkpoint, then it is killed
    first.keeper.last_words()
    metrics.write_text(metrics.read_text() + '{"step": 6, "lo')
    again = Rank(plan, group, tmp_path / "twice", metrics=str(metrics),
                 resume=str(tmp_path / "twice/checkpoints"))  # fmt: skip
    assert again.first == 4 and "note: going on from step 4" in again.notes
    assert again.train() == "steps"
    again.keeper.finish()
    assert again.keeper.losses == once.keeper.losses
    mine, theirs = again.parameters(), once.parameters()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [(row["step"], row["loss"], row["tokens_per_s"]) for row in rows(metrics)] == expected


def test_damaged_checkpoints_are_left_out_until_none_is_whole(
    plan: Plan, group: Any, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    Rank(plan, group, place).finish()
    checkpoints = place / "checkpoints"
    (checkpoints / ".partial-00000008").mkdir()
    data_file = checkpoints / "step-00000006" / "__0_0.distcp"
    data_file.write_bytes(data_file.read_bytes()[:-10])  # truncated
    metadata = checkpoints / "step-00000004" / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"embedding", b"embeddinh"))
    again = Rank(plan, group, place, resume=str(checkpoints), keep=1)
    assert again.first == 2
    left_out = [note for note in again.notes if "damaged" in note]
    assert "__0_0.distcp has" in left_out[0] and ".metadata is not what" in left_out[1]
    assert kept(place) == [2] and not list(checkpoints.glob(".partial*"))
    again.train(until=4)
    again.keeper.last_words()
    assert kept(place) == [4], "what was damaged does not count among those to keep"

    (checkpoints / "step-00000004" / folder.DOCUMENT).write_text("{")
    with pytest.raises(InputError, match=r"resume=.*no checkpoint is whole: .*not valid JSON"):
        Rank(plan, group, place, resume=str(checkpoints))


def test_checkpoints_of_others_are_refused(plan: Plan, group: Any, tmp_path: Path) -> None:
    place = tmp_path / "run"
    Rank(plan, group, place, steps=2).finish()
    checkpoints = place / "checkpoints"
    wider = replace(plan, model=replace(plan.model, name="wider", vocab=512))
    for look in (
        lambda: Rank(wider, group, tmp_path / "other", resume=str(checkpoints)),
        lambda: machine.check_training(wider, 6, job.Training(resume=str(checkpoints))),
    ):
        with pytest.raises(InputError, match="is a checkpoint of two-layers, the plan trains wid"):
            look()
    path = checkpoints / "step-00000002" / folder.DOCUMENT
    path.write_text(path.read_text().replace("checkpoint/1", "checkpoint/2"))
    with pytest.raises(InputError, match=r"schema=forerun.checkpoint/2: .* newer forerun"):
        Rank(plan, group, place, resume=str(checkpoints))


def test_what_would_change_the_curve_is_said(plan: Plan, group: Any, tmp_path: Path) -> None:
    place = tmp_path / "run"
    Rank(plan, group, place, steps=2).finish()
    other = replace(plan, workload=replace(plan.workload, seed=3, learning_rate=1e-4))
    again = Rank(other, group, place, resume=str(place / "checkpoints"))
    assert "note: seed is 3, and was 0 in the checkpoint" in again.notes
    assert any("learning rate is 0.0001" in note for note in again.notes)


def test_full_disk_leaves_the_last_checkpoint(
    plan: Plan, group: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "run"
    rank = Rank(plan, group, place)
    rank.train(until=2)
    rank.keeper.last_words()

    def full(*args: Any, **kwargs: Any) -> None:
        (folder.partial(place / "checkpoints", 0)).mkdir(exist_ok=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.state_dict_saver, "save", full)
    rank.first = 2
    assert rank.train() == "steps", "the run goes on"
    with pytest.raises(RunFailed, match=r"step 6 not written, the disk is full .* is of step 2"):
        rank.keeper.finish()
    assert any(note.startswith("warning: checkpoint of step 4 not") for note in rank.notes)
    assert kept(place) == [2]


def test_parameters_that_are_not_finite_are_not_kept(
    plan: Plan, group: Any, tmp_path: Path
) -> None:
    rank = Rank(plan, group, tmp_path / "run")
    rank.train(until=2)
    with torch.no_grad():
        next(rank.trainer.pieces[0].parameters()).fill_(float("nan"))
    rank.keeper.after_step(4, 1.0, 0.1, (False, False))
    assert rank.keeper.last_words() == "; the last checkpoint is of step 2"
    assert kept(tmp_path / "run") == [2]


def test_training_ends_when_asked(plan: Plan, group: Any, tmp_path: Path) -> None:
    rank = Rank(plan, group, tmp_path / "stop", steps=None)
    assert rank.train(wish=lambda step: step == 3) == "interrupted"
    assert rank.keeper.finish().step == 3 and kept(tmp_path / "stop") == [3, 2]
    rank = Rank(plan, group, tmp_path / "loss", steps=None, until_loss=100.0, every=50)
    assert rank.train() == "loss"
    assert rank.keeper.step == job.LOSS_WINDOW, "the mean of ten steps"
    assert rank.keeper._reason((False, True)) == "loss"
    rank.keeper.finish()


def test_moments_of_another_shape_keep_their_place(plan: Plan, group: Any, tmp_path: Path) -> None:
    """Quantised states: stored with the box they belong to, and read back into it."""
    place = tmp_path / "run"
    rank = Rank(plan, group, place, steps=3)
    parameter = rank.trainer.pieces[0].embedding.weight
    rank.train(until=1)
    rank.trainer.optimizer.state[parameter]["scales"] = torch.arange(5.0)
    shards = writer.optimizer_state(rank.trainer)
    assert "optimizer.embedding.weight.scales[0+256,0+32]" in shards
    rank.keeper.writer.save(rank.trainer, 1, [1.0])  # type: ignore[union-attr]
    rank.keeper.last_words()
    assert kept(place) == [1]


def test_a_pickle_in_a_checkpoint_is_not_run(plan: Plan, group: Any, tmp_path: Path) -> None:
    """Even with digests that fit: whoever writes a checkpoint may not run code where it is read."""
    place = tmp_path / "run"
    Rank(plan, group, place, steps=2).finish()
    path = place / "checkpoints" / "step-00000002"
    (path / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")
    found = document.read(Checkpoint, path / folder.DOCUMENT)
    files = found.files | {".metadata": folder.digest(path / ".metadata")}
    document.write(path / folder.DOCUMENT, replace(found, files=files))
    with pytest.raises(InputError, match=r"cannot be read \(.*posix.system is no plain value"):
        Rank(plan, group, place, resume=str(place / "checkpoints"))


def test_folders_that_cannot_be_used(plan: Plan, group: Any, tmp_path: Path) -> None:
    place = tmp_path / "run"
    Rank(plan, group, place, steps=2).finish()
    checkpoints = str(place / "checkpoints")

    def check(steps: int | None = 6, **ask: Any) -> None:
        machine.check_training(plan, steps, job.Training(**ask))

    with pytest.raises(InputError, match=r"holds checkpoints up to step 2; add --resume"):
        check(checkpoint=checkpoints)
    with pytest.raises(InputError, match=r"steps=2: the checkpoint in .* is of step 2; give more"):
        check(steps=2, checkpoint=checkpoints, resume=checkpoints)
    with pytest.raises(InputError, match=r"resume=.*empty: holds no checkpoint"):
        check(checkpoint=str(tmp_path / "new"), resume=str(tmp_path / "empty"))
    check(checkpoint=str(tmp_path / "new"), resume=str(tmp_path / "new"))  # nothing there yet
    with folder.locked(place / "checkpoints"):
        with pytest.raises(InputError, match="another run writes into it"):
            with folder.locked(place / "checkpoints"):
                pass
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"checkpoint=.*file: "):
        with folder.locked(tmp_path / "file"):
            pass
    shutil.rmtree(place)


def test_folder_that_nodes_do_not_share(
    plan: Plan, group: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(plan, group, tmp_path / "run")
    rank.keeper._check_shared(tmp_path / "run" / "checkpoints")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(InputError, match="rank 0 does not see what rank 0 writes there"):
        rank.keeper._check_shared(tmp_path / "run" / "checkpoints")


def test_event_files_for_tensorboard_go_on_after_a_resumption(
    plan: Plan, group: Any, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place, events = tmp_path / "run", str(tmp_path / "events")
    rank = Rank(plan, group, place, tensorboard=events)
    rank.train(until=5)
    rank.keeper.last_words()
    rank.keeper.metrics.close()  # type: ignore[union-attr]
    Rank(plan, group, place, tensorboard=events, resume=str(place / "checkpoints")).finish()
    found = EventAccumulator(events)
    found.Reload()
    losses = found.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6], "step 5 once, of the resumption"
    assert {"step_s", "tokens_per_s", "memory_bytes"} <= set(found.Tags()["scalars"])
