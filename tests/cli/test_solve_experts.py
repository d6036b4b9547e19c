"""`forerun solve experts` from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

ONE = "expert,load\na,100\nb,5\nc,7\nd,9\n"
TWO = "layer,a,b,c,d\nfirst,100,5,7,9\nsecond,3,3,3,90\n"


@pytest.fixture
def loads(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes loads and gives the path of the file."""

    def write(text: str) -> Path:
        path = tmp_path / "loads.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_document_of_one_layer(invoke: Callable, loads: Callable, tmp_path: Path) -> None:
    saved = tmp_path / "placement.json"
    arguments = ["solve", "experts", loads(ONE), "--ranks", 4, "--slots", 2, "--nodes", 2]
    result = invoke(*arguments, "--json", "-o", saved)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads(saved.read_text()) == found
    assert found.pop("seconds") >= 0
    assert found["replicas"] == {"a": 4, "b": 1, "c": 1, "d": 2}
    assert sorted(map(sorted, found["placement"])) == [
        list("ab"),
        list("ac"),
        list("ad"),
        list("ad"),
    ]
    assert (found["max_load"], found["mean_load"], found["lower_bound"]) == (32, 30.25, 32)
    assert (found["gap"], found["optimal"], found["limit"]) == (0, True, None)
    assert found["imbalance"] == pytest.approx(32 / 30.25)
    assert found["contiguous_imbalance"] == pytest.approx(100 / 30.25)
    local = 100 + (5 + 7) / 2 + 9  # a and d on both nodes, b and c on one
    assert found["cross_node_fraction"] in (
        pytest.approx(1 - local / 121),
        pytest.approx(1 - (local - 4.5) / 121),  # d twice on one node
    )


def test_a_row_per_layer(invoke: Callable, loads: Callable) -> None:
    result = invoke("solve", "experts", loads(TWO), "--ranks", 2, "--slots", 3, "--json")
    found = json.loads(result.stdout)
    assert [layer["layer"] for layer in found["layers"]] == ["first", "second"]
    assert found["imbalance"] == max(layer["imbalance"] for layer in found["layers"])
    assert found["gap"] == 0 and found["limit"] is None
    assert "cross_node_fraction" not in found["layers"][0]


def test_slots_default_to_one_place_per_expert(invoke: Callable, loads: Callable) -> None:
    found = json.loads(invoke("solve", "experts", loads(ONE), "--ranks", 2, "--json").stdout)
    assert set(found["replicas"].values()) == {1}
    assert found["max_load"] == 105


def test_groups_stay_within_a_node(invoke: Callable, loads: Callable) -> None:
    arguments = ["--ranks", 4, "--slots", 2, "--nodes", 2, "--groups", 2, "--json"]
    found = json.loads(invoke("solve", "experts", loads(ONE), *arguments).stdout)
    assert {e for rank in found["placement"][:2] for e in rank} in (set("ab"), set("cd"))
    assert found["max_load"] == 52.5 and found["cross_node_fraction"] == 0.5


def test_people_get_tables(invoke: Callable, loads: Callable) -> None:
    shown = invoke("solve", "experts", loads(ONE), "--ranks", 4, "--slots", 2).stdout
    assert "contiguous / mean" in shown and "no placement is better" in shown
    shown = invoke("solve", "experts", loads(TWO), "--ranks", 2).stdout
    assert "first" in shown and "second" in shown


@pytest.mark.parametrize(
    ("text", "options", "code", "words"),
    [
        (ONE, "--ranks 0", 2, "ranks=0"),
        (ONE, "--ranks -2", 2, "ranks=-2"),
        (ONE, "--ranks 2 --slots 0", 2, "slots=0"),
        (ONE, "--ranks 2 --slots 1", 3, "hold 2 experts, there are 4; raise --slots to 2"),
        (ONE, "--ranks 3 --nodes 2", 2, "nodes=2: does not divide 3 ranks"),
        (ONE, "--ranks 4 --groups 2", 2, "groups=2: need nodes"),
        (ONE, "--ranks 4 --nodes 2 --groups 3", 2, "groups=3: does not divide 4 experts"),
        (ONE, "--ranks 4 --nodes 4 --groups 2", 2, "groups=2: not a multiple of 4 nodes"),
        (ONE + "e,-1\n", "--ranks 2", 2, "row 5 load=-1"),
        (ONE + "e,nan\n", "--ranks 2", 2, "row 5 load=nan"),
        (ONE + "e,many\n", "--ranks 2", 2, "row 5 load=many"),
        (ONE + "a,1\n", "--ranks 2", 2, "expert=a: stands twice"),
        (ONE + ",1\n", "--ranks 2", 2, "row 5 expert=(empty)"),
        (TWO + "first,1,1,1,1\n", "--ranks 2", 2, "layer=first: stands twice"),
        (TWO + "third,1,1,inf,1\n", "--ranks 2", 2, "row 3 c=inf"),
        (TWO + "third,1,1\n", "--ranks 2", 2, "row 3=3"),
        ("layer\n0\n", "--ranks 2", 2, "names no expert"),
        ("layer,a,a\n0,1,2\n", "--ranks 2", 2, "header=a"),
        ("name,load\na,1\n", "--ranks 2", 2, "no column expert"),
        ("", "--ranks 2", 2, "has no rows"),
        (ONE, "", 2, "--ranks"),
    ],
)
def test_bad_input(
    refused: Callable, loads: Callable, text: str, options: str, code: int, words: str
) -> None:
    assert words in refused(["solve", "experts", loads(text), *options.split()], code)


def test_an_infeasible_ask_prints_its_document(invoke: Callable, loads: Callable) -> None:
    result = invoke("solve", "experts", loads(ONE), "--ranks", 2, "--slots", 1, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["infeasible"]["smallest_change"] == "raise --slots to 2"
