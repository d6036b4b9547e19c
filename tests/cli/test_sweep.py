"""forerun sweep: tables, questions, files, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result

from forerun.cli.sweep_inputs import parse_amount, parse_duration
from forerun.cli.sweep_plot import LEFT, RIGHT, TOP, WIDTH, axis
from forerun.errors import InputError

Invoke = Callable[..., Result]
Refused = Callable[..., str]

JOB = "--model tiny-25m --seq-len 1k --global-batch 64".split()
SIMPLE = "--tp 1 --pp 1 --cp 1 --recompute none --offload 0".split()
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.csv"
    path.write_text("gpu,usd_per_hour\nH100,2.5\nA100-80GB,1.25\n", encoding="utf-8")
    return path


def test_a_table_of_combinations_with_its_files(
    invoke: Invoke, prices: Path, tmp_path: Path
) -> None:
    table, plot = tmp_path / "t.csv", tmp_path / "p.svg"
    result = invoke(
        "sweep", "--model", "tiny-25m", "--gpus", "1xH100,2xA100-80GB", "--seq-len", "1k,2k",
        "--global-batch", "65536tok", *SIMPLE, "--prices", prices, "-o", table, "--plot", plot,
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = found["rows"]
    assert [(r["gpus"], r["seq_tokens"], r["global_batch_seqs"]) for r in rows] == [
        ("1xH100", 1024, 64), ("2xA100-80GB", 1024, 64),
        ("1xH100", 2048, 32), ("2xA100-80GB", 2048, 32),
    ]  # fmt: skip
    for row in rows:
        assert row["status"] == "planned" and row["label"] and row["price_usd_per_hour"] == 2.5
        tokens_per_s = row["estimate"]["tokens_per_s"]
        assert row["usd_per_billion_tokens"] == pytest.approx(2.5e9 / 3600 / tokens_per_s)
    assert found["pareto"] and set(found["pareto"]) <= set(range(4))
    assert found["pareto_axes"] == ["usd_per_hour", "tokens_per_s"]
    assert found["question"] == "table" and found["limit"] is None
    lines = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    assert [int(line["pareto"]) for line in lines] == [int(i in found["pareto"]) for i in range(4)]
    drawing = ElementTree.fromstring(plot.read_text(encoding="utf-8"))
    assert drawing.tag == f"{SVG}svg"
    assert len(list(drawing.iter(f"{SVG}circle"))) == 4 + 2  # a point per row, a mark per job
    assert len(list(drawing.iter(f"{SVG}polyline"))) == 2
    words = {element.text for element in drawing.iter(f"{SVG}text")}
    assert {"price (USD per hour)", "throughput (tokens/s)", "1xH100"} <= words


def test_the_table_for_people_and_the_page(invoke: Invoke, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = invoke(
        "sweep", *JOB, "--gpus", "1xH100,2xH100", *SIMPLE, "--tokens", "1B", "--plot", page
    )
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.stdout and "days" in result.stdout
    assert "USD/h" not in result.stdout  # no price is known
    assert "Pareto front of its job" in result.stdout
    assert "H100 -> H100-SXM-80GB" in result.stderr
    ElementTree.fromstring(page.read_text(encoding="utf-8").partition("\n")[2])
    assert "<script" not in page.read_text(encoding="utf-8")
    shown = invoke("sweep", *JOB, "--gpus", "1xH100,2xH100", *SIMPLE, "--top", "1").stdout
    assert "1 of 2 rows shown" in shown and "2xH100" in shown and "1xH100 " not in shown


def test_names_of_the_user_are_escaped_in_the_plot(invoke: Invoke, tmp_path: Path) -> None:
    from forerun import document
    from forerun.catalogs import load_model

    model, plot = tmp_path / "m.json", tmp_path / "p.svg"
    document.write(model, load_model("tiny-25m"))
    model.write_text(model.read_text().replace('"tiny-25m"', '"a<b & \\"c\\""'))
    arguments = ("--gpus", "1xH100", "--seq-len", "1k", "--global-batch", "8", *SIMPLE)
    result = invoke("sweep", "--model", model, *arguments, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert 'a<b & "c"' in "".join(ElementTree.fromstring(plot.read_text()).itertext())


def test_fewest_gpus_by_each_kind_of_goal(invoke: Invoke) -> None:
    def devices(*goal: str) -> int:
        result = invoke(
            "sweep", *JOB, "--gpus", "4xH100", *SIMPLE, "--fewest-gpus", "--max-nodes", "1",
            *goal, "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        (answer,) = found["answers"]
        assert found["question"] == "fewest-gpus" and answer["text"]
        row = found["rows"][answer["row"]]
        assert row["estimate"]["fits"] == "yes"
        needed.append(row["estimate"]["tokens_per_s"])
        return row["num_devices"]

    needed: list[float] = []
    assert devices("--min-tokens-per-s", "1k") == 1
    assert devices("--min-tokens-per-s", f"{int(needed[0] * 1.2)}") == 2
    step_s = 65536 / (needed[0] * 1.2)
    assert devices("--step-time", f"{1e3 * step_s:.6f}ms") == 2
    assert devices("--tokens", "1B", "--deadline", f"{1e9 / (needed[0] * 1.2):.3f}s") == 2


def test_an_answer_is_shown_with_its_row(invoke: Invoke) -> None:
    arguments = ("--global-batch", "4096tok", "--gpus", "1xH100", *SIMPLE, "--longest-context")
    result = invoke("sweep", "--model", "tiny-25m", *arguments)
    assert result.exit_code == 0, result.output
    assert "1xH100 trains tiny-25m on sequences of 4,096 tokens" in result.stdout
    assert ">  answers the question" in result.stdout


def test_cheapest_needs_prices_and_takes_the_least(
    invoke: Invoke, refused: Refused, prices: Path
) -> None:
    ask = ("sweep", *JOB, *SIMPLE, "--gpus", "1xH100,1xA100-80GB", "--cheapest")
    assert "--prices" in refused([*ask, "--tokens", "1B"], 2)
    result = invoke(*ask, "--tokens", "1B", "--prices", prices, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    costs = [row["run_usd"] for row in found["rows"]]
    assert found["answers"][0]["row"] == costs.index(min(costs))


@pytest.mark.parametrize(
    "question", [[], ["--fewest-gpus", "--step-time", "1ms", "--max-nodes", "1"]]
)
def test_without_an_answer_the_document_is_printed_and_the_code_is_3(
    invoke: Invoke, question: list[str]
) -> None:
    job = "--model 70b --gpus 1xA100-40GB --seq-len 8k --global-batch 8".split()
    result = invoke("sweep", *job, *SIMPLE, *question, "--json")
    assert result.exit_code == 3, result.output
    found = json.loads(result.stdout)
    assert found["pareto"] == [] and found["rows"][0]["status"] == "infeasible"
    assert "no feasible plan" in result.stderr


def test_a_batch_in_tokens_may_be_rounded(invoke: Invoke) -> None:
    def asked(*more: str) -> tuple[int, str]:
        job = ("--model", "tiny-25m", "--seq-len", "1k", "--global-batch", "125ktok")
        result = invoke("sweep", *job, "--gpus", "1xH100", *SIMPLE, "--json", *more)
        return json.loads(result.stdout)["rows"][0]["global_batch_seqs"], result.stderr

    plain, rounded = asked(), asked("--round-batch")
    assert plain[0] == 122 and "--round-batch takes 128" in plain[1]
    assert rounded[0] == 128 and "128 sequences" in rounded[1]


GPUS = ["--gpus", "1xH100"]
FEWEST = ["--fewest-gpus"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--gpus", "1xH100,,2xH100"], "gpus=1xH100,,2xH100"),
        (["--gpus", ""], "gpus=(empty)"),
        (["--gpus", "8xH1000"], "gpus="),
        ([], "gpus=(missing)"),
        ([*GPUS, *FEWEST, "--cheapest"], "fewest-gpus, cheapest=on"),
        ([*GPUS, *FEWEST], "deadline=(missing)"),
        ([*GPUS, *FEWEST, "--deadline", "30d"], "tokens=(missing)"),
        ([*GPUS, *FEWEST, "--step-time", "1s", "--min-tokens-per-s", "1M"], "step-time,"),
        ([*GPUS, *FEWEST, "--step-time", "0s"], "step-time=0s"),
        ([*GPUS, "--deadline", "30d", "--tokens", "1T"], "deadline=30d"),
        ([*GPUS, "--tokens", "none"], "tokens=none"),
        ([*GPUS, "--cheapest"], "tokens=(missing)"),
        ([*GPUS, "--longest-context"], "seq-len=1k"),
        ([*GPUS, "--largest-model"], "model=tiny-25m"),
        ([*GPUS, "--max-nodes", "4"], "max-nodes=4"),
        ([*GPUS, "--plot", "p.png"], "plot=p.png"),
        ([*GPUS, "-o", "t.xlsx"], "output=t.xlsx"),
        ([*GPUS, "--tp", "3"], "tp=3"),
        ([*GPUS, "--prices", "nowhere.csv"], "file=nowhere.csv"),
        (["--gpus", "2xcpu", *FEWEST, "--step-time", "1s"], "gpus=2xcpu"),
    ],
)
def test_bad_input_is_one_line(refused: Refused, arguments: list[str], field: str) -> None:
    assert refused(["sweep", *JOB, *arguments], 2).startswith(f"forerun: {field}")


def test_longest_context_wants_the_batch_in_tokens(refused: Refused) -> None:
    job = ["--model", "tiny-25m", "--global-batch", "64", *GPUS, "--longest-context"]
    assert "give tokens" in refused(["sweep", *job], 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu,usd_per_hour\nH100,0\n", "row 1 usd_per_hour=0"),
        ("gpu,usd_per_hour\nH100,-1\n", "row 1 usd_per_hour=-1"),
        ("gpu,usd_per_hour\nH100,nan\n", "row 1 usd_per_hour=nan"),
        ("gpu,usd_per_hour\nH10,1\n", "row 1 gpu=H10"),
        ("gpu,usd_per_hour\nH100,1\nh100,2\n", "row 2 gpu=h100"),
        ("gpu,usd\nH100,1\n", "header="),
        ("gpu,usd_per_hour\n", "file="),
    ],
)
def test_bad_prices_are_one_line(refused: Refused, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text, encoding="utf-8")
    line = refused(["sweep", *JOB, *GPUS, "--prices", path], 2)
    assert line.startswith(f"forerun: {says}")


def test_durations_and_amounts() -> None:
    assert parse_duration("45min", "deadline") == 2700.0
    assert parse_duration("300ms", "step-time") == pytest.approx(0.3)
    assert parse_amount("15T", "tokens") == 15e12 and parse_amount("300Btok", "tokens") == 3e11
    for text in ("", "5", "-5s", "5 parsecs", "0d"):
        with pytest.raises(InputError):
            parse_duration(text, "deadline")
    for text in ("", "0", "-5", "1e999", "many"):
        with pytest.raises(InputError):
            parse_amount(text, "tokens")


@pytest.mark.parametrize("values", [[1.0], [3.0, 4.0], [1.0, 1e6], [1e-3, 5.0], [7e11, 9e11]])
def test_axes_hold_their_values_and_label_a_few(values: list[float]) -> None:
    scale = axis(values, LEFT, WIDTH - RIGHT)
    assert all(LEFT <= scale.place(value) <= WIDTH - RIGHT for value in values)
    assert 2 <= len(scale.ticks) <= 25
    assert all(LEFT - 1 <= scale.place(tick) <= WIDTH - RIGHT + 1 for tick in scale.ticks)
    upward = axis(values, 400.0, TOP)
    assert upward.place(max(values)) <= upward.place(min(values))


@pytest.mark.parametrize("gpus", ["2xH100", "2x2xH100"])
def test_a_row_is_what_plan_says(invoke: Invoke, gpus: str) -> None:
    job = "--model tiny-25m --seq-len 1k --global-batch 16".split()
    planned = json.loads(invoke("plan", *job, "--gpus", gpus, "--top", "1", "--json").stdout)
    (row,) = json.loads(invoke("sweep", *job, "--gpus", gpus, "--json").stdout)["rows"]
    (best,) = planned["plans"]
    assert (row["label"], row["estimate"]) == (best["label"], best["estimate"])
