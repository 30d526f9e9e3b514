import json
import os
import subprocess
import sys

import pytest
import torch

import fngd_kernels as fk
from bench.kernels import __main__ as kernels_main
from bench.kernels import ceilings, plain, plot, table
from bench.kernels.__main__ import main
from bench.kernels.cases import cases
from bench.kernels.ceilings import Ceilings
from bench.kernels.roofline import Work, roofline
from bench.kernels.run import check, run
from bench.kernels.shapes import NETWORKS, TINY, Conv, Linear
from paths import ROOT

CPU = torch.device("cpu")
OPS = {
    *("gram", "gram_conv", "gram_embedding", "gram_hadamard", "solve"),
    *("combine", "combine with bias", "combine_conv", "combine_embedding", "scale_bias"),
}


@pytest.fixture(autouse=True)
def not_interpreting(monkeypatch):
    # Tests of the kernels set it for the whole process.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def tiny_cases(dtype=torch.float32):
    return {case.op: case for case in cases([TINY], [dtype], CPU, quick=True)}


def test_every_operator_is_measured_recorded_and_drawn(tmp_path, capsys):
    results = tmp_path / "new" / "kernels.jsonl"
    command = ["--tiny", "--device", "cpu", "--rounds", "2", "--output", str(results)]
    assert main(command) == 0
    assert "on the CPU: fngd takes its library path" in capsys.readouterr().out
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["op"] for row in rows} == OPS
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    for row in rows:
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["rounds"] == 2
        assert row["path"] == "library on the CPU"
        assert row["percent_of_roofline"] is row["workspace_bytes"] is None
        assert (row["buffers"], row["timed"]) == (1, "calls")
        assert {"commit", "gpu", "torch", "triton", "cpu"} <= row.keys()
        assert (row["error"] is None) == (row["role"] == "unweighted")
    baselines = [row for row in rows if row["contender"] == row["baseline"]]
    assert {row["ratio"] for row in baselines} == {1.0}

    assert main([*command, "--shapes", "^combine/.*T=5.*float32"]) == 0
    assert len(results.read_text().splitlines()) == len(rows) + 3

    plot.main([str(results), str(tmp_path / "plots")])
    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert {"gram-bfloat16", "combine-with-bias-float32", "solve-float32"} <= drawn


def test_interpreted_kernels_pass_the_gate():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.kernels", "--tiny", "--gate", "--device", "cpu"]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'fused loop'" in done.stdout


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_wrong_kernel_gets_no_figure(wrong, tmp_path, monkeypatch, capsys):
    combine = fk.combine
    monkeypatch.setattr(fk, "combine", lambda *a, **k: [wrong * part for part in [combine(*a)]])
    with pytest.raises(AssertionError, match=r"error of fngd .*, over 1\.0e-05"):
        run(tiny_cases()["combine"], rounds=1, device=CPU)
    results = tmp_path / "kernels.jsonl"
    command = ["--tiny", "--device", "cpu", "--dtypes", "float32", "--shapes", "^combine/"]
    assert main([*command, "--output", str(results)]) == 3
    assert "FAILED combine/tiny" in capsys.readouterr().out
    assert not results.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_ways_agree_with_the_definitions(dtype):
    for case in tiny_cases(dtype).values():
        errors = check(case, case.inputs())
        limit = 1e-5 if case.dtype == torch.float32 else 2**-6
        assert max(errors.values()) < limit, case.name


def test_chunks_do_not_change_the_plain_results(monkeypatch):
    a, e = torch.randn(5, 7, 3), torch.randn(5, 7, 4)
    x, layer = torch.randn(5, 2, 6, 6), Conv(2, 3, 3, 1, 6)
    grad, ids = torch.randn(5, 3, 6, 6), torch.randint(4, (5, 7))

    def results():
        yield plain.gram_pairs(a, e, True)
        yield plain.gram_explicit(a, e, True)
        yield plain.gram_conv(x, grad, layer, True)
        yield plain.gram_embedding(ids, e)

    whole = list(results())
    monkeypatch.setattr(plain, "CHUNK_BYTES", 2 * 7 * 5 * 7 * 4)
    for chunked, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(chunked, expected)


def test_shapes_are_those_of_the_networks():
    def weights(name, kind):
        (network,) = (network for network in NETWORKS if network.name == name)
        layers = [layer for layer in network.layers if isinstance(layer, kind)]
        if kind is Conv:
            return sum(layer.count * layer.weights for layer in layers)
        return sum(layer.count * layer.inputs * layer.outputs for layer in layers)

    # Parameters of torchvision's models without those of normalisation and biases.
    assert weights("ResNet-18 224", Conv) == 11_166_912
    assert weights("ResNet-50 224", Conv) == 23_454_912
    assert weights("ResNet-50 224", Linear) == 2_048_000
    assert weights("ViT-S", Conv) + weights("ViT-S", Linear) == 21_912_576
    assert weights("GPT-2 small", Linear) == 84_934_656


def test_quick_takes_each_shape_once():
    chosen = list(cases(NETWORKS, [torch.bfloat16], CPU, quick=True))
    once = [case for case in chosen if case.op not in ("solve", "gram_hadamard")]
    layers = [(case.op, case.layer, case.dtype) for case in once]
    assert len(layers) == len(set(layers))
    everything = list(cases(NETWORKS, [torch.bfloat16], CPU, quick=False))
    assert {(case.op, case.layer) for case in everything} == {(case.op, case.layer) for case in chosen}


def test_roofline_is_the_slower_of_compute_and_memory():
    ceilings = Ceilings(4e12, {"bf16": 800e12, "tf32": 400e12, "fp32": 50e12})
    seconds, bound = roofline(Work(((10**12, "bf16"), (10**12, "tf32")), 10), ceilings)
    assert seconds == pytest.approx(2 / 800 + 2 / 400)
    assert bound == "compute"
    assert roofline(Work((), 4 * 10**10), ceilings) == (pytest.approx(0.01), "memory")
    assert roofline(Work((), 1), None) is None


def test_ceilings_are_those_of_the_device_in_the_file_or_measured(tmp_path, monkeypatch):
    path, gpu = tmp_path / "ceilings.jsonl", torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU A")
    monkeypatch.setattr(ceilings, "measure", lambda _: measured.pop())
    measured = [Ceilings(2.0, {}), Ceilings(1.0, {"bf16": 3.0})]
    assert ceilings.known(path, CPU) is None
    assert ceilings.known(path, gpu) == ceilings.known(path, gpu) == Ceilings(1.0, {"bf16": 3.0})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GPU B")
    assert ceilings.known(path, gpu).bytes_per_second == 2.0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["gpu"] for row in rows] == ["GPU A", "GPU B"]


def test_ceilings_count_what_is_moved_and_multiplied(monkeypatch, capsys):
    seconds = {"copy": 2.0, "product": 4.0}
    monkeypatch.setattr(ceilings, "_seconds", lambda run, _: seconds["product" if run() is None else "copy"])
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *_: None)
    found = ceilings.measure(CPU, order=8, copied=1000)
    assert found == Ceilings(1000, dict.fromkeys(("bf16", "tf32", "fp32"), 2 * 8**3 / 4))


def test_what_is_asked_for_first_comes_first(tmp_path, capsys):
    command = ["--tiny", "--device", "cpu", "--gate", "--dtypes", "float32", "--first", "^solve|T=1 3->2"]
    assert main(command) == 0
    names = [line.split("/")[0] for line in capsys.readouterr().out.splitlines() if "/tiny/" in line]
    assert sorted(names[:4]) == ["combine", "combine with bias", "gram", "solve"]
    assert len(names) > 10


def test_no_case_follows_on_a_device_that_is_lost(monkeypatch, capsys):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels_main, "check", lost)
    command = ["--tiny", "--device", "cpu", "--gate"]
    everything = main(command)
    monkeypatch.setattr(kernels_main, "synchronise", lost)
    assert main(command) == 1 < everything
    assert "the device is lost to this process" in capsys.readouterr().out


def test_embeddings_are_measured_in_the_dtype_that_autocast_gives():
    chosen = list(cases([TINY], [torch.bfloat16, torch.float32], CPU, quick=True))
    dtypes = [case.dtype for case in chosen if case.op == "gram_embedding"]
    assert dtypes == [torch.bfloat16, torch.float32]


def test_convolutions_are_measured_in_both_layouts():
    chosen = [case for case in cases([TINY], [torch.float32], CPU, quick=True) if case.op == "gram_conv"]
    assert [case.layer.split()[-1] for case in chosen] == ["channels_last", "NCHW"]
    formats = (torch.channels_last, torch.contiguous_format)
    for case, memory_format in zip(chosen, formats, strict=True):
        assert all(t.is_contiguous(memory_format=memory_format) for t in case.inputs())


def test_of_repeated_measurements_the_last_counts():
    common = {"gpu": None, "op": "x", "dtype": "float32", "network": "n", "layer": "l", "batch": 1}
    common["percent_of_roofline"] = 50
    rows = [
        {**common, "contender": name, "role": role, "median_s": seconds, "ratio": ratio}
        for name, role, seconds, ratio in [
            ("fused", "fngd", 1, 0.1),
            ("fused", "fngd", 3, 0.3),
            ("fngd", "fngd", 2, 0.2),
            ("plain", "plain", 0.5, 1),
        ]
    ]
    (best,) = table.best_rows(rows).values()
    assert best["contender"] == "fngd"
    (line,) = table.table(rows).splitlines()[1:]
    assert line.split() == [
        "x",
        "float32",
        "1",
        "0.20",
        "0.20",
        "0.20",
        "50.00",
    ]
    assert table.geometric_mean([1, 100]) == pytest.approx(10)
