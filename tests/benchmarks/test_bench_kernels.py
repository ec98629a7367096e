# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the kernels, as far as it needs no GPU: tiny sizes on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _peers  # noqa: E402
import _record  # noqa: E402
import bench_kernels as bench  # noqa: E402

from nemo_rl_ref.kernels import floors  # noqa: E402

QUICK = ["--device", "cpu", "--quick", "--rounds", "1"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The result file of a quick run beside an entry of another script, and what was printed."""
    folder = tmp_path_factory.mktemp("results")
    _record.write_result("other", {"kept": True}, device="cpu", folder=folder)
    bench.main([*QUICK, "--write", "--results", str(folder)])
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def test_the_results_are_written_beside_others(written):
    assert written["other"]["kept"]
    entry = written["kernels"]
    assert set(entry["workloads"]) == set(bench.ASKS) == set(_peers.CONTENDERS)
    assert set(entry["peers"]) == set(_peers.PACKAGES)
    assert len(entry["commit"]) == 40
    assert entry["versions"]["torch"] == torch.__version__
    for name, result in entry["workloads"].items():
        contenders = set(result["seconds"]) | set(result["missing"])
        assert contenders == set(_peers.CONTENDERS[name])
        assert {"ours", "PyTorch", "TRL"} & contenders <= set(result["seconds"])
        assert all(seconds > 0 for seconds in result["seconds"].values())
        assert result["sets of inputs"] >= 2
        for contender, seconds in result["seconds"].items():
            share = result["floor, seconds"] / seconds
            assert result["of floor"][contender] == pytest.approx(share, abs=1e-4)


def test_contenders_compute_the_same(written):
    for name, result in written["kernels"]["workloads"].items():
        for contender, apart in result["largest difference to ours"].items():
            # Some peers round what they return to bfloat16, whose step at an entropy of 6 is 0.03.
            assert apart < 0.15, (name, contender)


def small():
    """A workload of eight tokens and its inputs."""
    inputs = [torch.randn(8, 11), torch.randint(11, (8,))]
    floor = floors.token_logprobs(8, 11, backward=False)
    return bench.Workload(bench.FORWARD, {}, lambda: inputs, floor), inputs


def selected(logits, targets):
    return _peers.without_entropy(logits, targets).detach()


@pytest.mark.parametrize(
    ("peer", "apart"),
    [
        (lambda logits, targets: selected(logits, targets) + 0.5, 0.5),
        (lambda logits, targets: (selected(logits, targets), None), 0.0),
        (lambda logits, targets: selected(logits, targets).sum() + 3, 3 / 8),
        (lambda logits, targets: selected(logits, targets) * torch.nan, torch.nan),
    ],
)
def test_a_difference_to_ours_is_found(peer, apart):
    found = bench.difference(peer, selected, *small())
    assert found == pytest.approx(apart, abs=1e-5, nan_ok=True)


def test_a_second_result_is_compared_too():
    def wrong(logits, targets):
        chosen, entropy = _peers.with_entropy(logits, targets)
        return chosen, entropy + 0.25

    apart = bench.difference(wrong, _peers.with_entropy, *small())
    assert apart == pytest.approx(0.25, abs=1e-5)


def test_absent_peers_are_reported_as_absent(written):
    entry = written["kernels"]
    for peer in ("Liger", "quack", "cut-cross-entropy"):
        if entry["peers"][peer] == "absent":
            reasons = [
                reason
                for result in entry["workloads"].values()
                for contender, reason in result["missing"].items()
                if contender.startswith(peer)
            ]
            assert reasons
            assert all(reason.startswith("absent: ") for reason in reasons)


def test_a_peer_that_fails_is_reported_and_ours_is_not_excused(monkeypatch):
    def broken():
        def run(*inputs):
            raise RuntimeError("out of luck\nmore")

        return run

    workload = bench.workloads(torch.device("cpu"), quick=True)[0]
    makers = _peers.CONTENDERS[workload.name]
    monkeypatch.setitem(makers, "TRL", broken)
    _, missing = bench.build(workload, workload.make(), set())
    assert missing["TRL"] == "failed: RuntimeError: out of luck"
    monkeypatch.setitem(makers, "ours", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        bench.build(workload, workload.make(), set())


def test_the_table_has_a_line_for_every_contender(written):
    for name, result in written["kernels"]["workloads"].items():
        lines = bench.report(name, result).splitlines()
        named = [line[:24].strip() for line in lines[2:]]
        assert sorted(named[1:]) == sorted([*result["seconds"], "floor", *result["missing"]])


def reached():
    """Results of an H100 that reaches everything that is asked."""
    result = {
        "of floor": {"ours": 0.95},
        "seconds": {"ours": 1.0, "PyTorch": 3.0, "NeMo RL's time loop": 600.0, "A (scalar)": 0.5},
        "extra bytes": {"ours": 1 << 20},
        "kernels": {"forward": 1, "backward": 1},
    }
    return {name: json.loads(json.dumps(result)) for name in bench.ASKS}


def test_what_is_asked_on_an_h100():
    asks = bench.judge(reached(), "NVIDIA H100 80GB HBM3")
    assert len(asks) == 10
    assert [ask for ask in asks if ask["met"] is not True] == []
    assert {ask["met"] for ask in bench.judge(reached(), "AMD EPYC")} == {None}


@pytest.mark.parametrize(
    ("workload", "key", "name", "value", "missed"),
    [
        (bench.FORWARD, "of floor", "ours", 0.89, "at least 90 % of copy bandwidth"),
        (bench.BOTH, "of floor", "ours", 0.84, "at least 85 % of copy bandwidth"),
        (bench.BOTH, "seconds", "PyTorch", 0.9, "faster than every peer"),
        (bench.LINEAR, "of floor", "ours", 0.79, "at least 80 % of its matrix products' speed"),
        (bench.LINEAR, "seconds", "TRL", 0.9, "as fast as the fastest peer with values per token"),
        (
            bench.LINEAR, "extra bytes", "ours", (512 << 20) + 1,
            "at most 512 MiB beyond inputs and gradients",
        ),
        (bench.GAE, "of floor", "ours", 0.69, "at least 70 % of copy bandwidth"),
        (bench.GAE, "seconds", "NeMo RL's time loop", 499.0, "at least 500 times the time loop"),
        (bench.CLIPPED, "kernels", "backward", 2, "one kernel each way"),
        (bench.CLIPPED, "seconds", "torch.compile", 0.9, "faster than torch.compile"),
    ],
)  # fmt: skip
def test_what_is_missed_on_an_h200(workload, key, name, value, missed):
    found = reached()
    found[workload][key][name] = value
    asks = bench.judge(found, "NVIDIA H200")
    assert [(ask["workload"], ask["asked"]) for ask in asks if not ask["met"]] == [
        (workload, missed)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*QUICK, "--write"], "the sizes of --quick are no result; give --results DIR"),
        ([*QUICK, "--only", "nonsense"], "no workload has 'nonsense' in its name"),
        (["--rounds", "0"], "--rounds: got 0, expected 1 or more"),
    ],
)
def test_arguments_that_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    bench.main([])
    assert capsys.readouterr().out.startswith("no GPU: the kernels were not measured")


def bytes_of(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_floors_count_the_tensors_that_have_to_be_moved():
    N, V, H = 6, 11, 5
    logits = torch.zeros(N, V, dtype=torch.bfloat16)
    targets, number = torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    forward = floors.token_logprobs(N, V, backward=False)
    assert forward.bytes == bytes_of(logits, targets, number, number)
    both = floors.token_logprobs(N, V, backward=True)
    kept = (number,) * 3
    assert both.bytes - forward.bytes == bytes_of(logits, logits, targets, *kept)

    hidden, weight = torch.zeros(N, H).bfloat16(), torch.zeros(V, H).bfloat16()
    linear = floors.linear_token_logprobs(N, V, H)
    assert linear.bytes == bytes_of(*[hidden, weight] * 3, targets, targets, *kept)
    product = 2 * N * H * V
    assert linear.operations == 4 * product
    assert linear.seconds(1e3, 1e3) == max(linear.bytes, linear.operations) / 1e3

    tokens = torch.zeros(3, 4)
    assert floors.gae(3, 4).bytes == 5 * bytes_of(tokens)
    assert floors.clipped_pg_terms(3, 4).bytes == 13 * bytes_of(tokens)
