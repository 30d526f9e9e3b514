import gzip
import json

import pytest

from bench.steps import contenders, profile, trace


def event(cat, name, ts, dur, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def two_steps():
    """Two steps of 10 ms on a device: a launch each in forward and, from another thread, in backward."""
    events = []
    for number, start in enumerate((0, 20_000)):
        a, b, c = (10 * number + i for i in range(3))
        events += [
            event("user_annotation", "step", start, 10_000),
            event("user_annotation", "forward", start, 3_000),
            event("user_annotation", "backward", start + 3_000, 5_000),
            event("user_annotation", "update", start + 8_000, 1_000),
            event("cuda_runtime", "cudaLaunchKernel", start + 1_000, 10, correlation=a),
            event("cuda_driver", "cuLaunchKernelEx", start + 4_000, 10, correlation=b),
            event("cuda_runtime", "cudaMemcpyAsync", start + 9_500, 10, correlation=c),
            event("cuda_runtime", "cudaStreamSynchronize", start + 9_600, 10, correlation=c + 1),
            event("kernel", "gemm", start + 2_000, 1_500, correlation=a),
            event("kernel", "gemm", start + 6_000, 4_000, correlation=b),
            event("gpu_memcpy", "Memcpy DtoH", start + 11_000, 500, correlation=c),
        ]
    # what runs outside of the steps does not count
    events.append(event("cuda_runtime", "cudaDeviceSynchronize", 40_000, 10, correlation=90))
    events.append(event("kernel", "gemm", 50_000, 10, correlation=91))
    return events


def test_device_time_counts_for_the_phase_that_launched_it():
    summary = trace.summarize(two_steps())
    assert summary.steps == 2
    assert summary.phases["forward"] == trace.Phase(host_ms=3, device_ms=1.5)
    assert summary.phases["backward"] == trace.Phase(host_ms=5, device_ms=4)
    assert summary.phases["update"] == trace.Phase(host_ms=1, device_ms=0)
    assert summary.phases["other"] == trace.Phase(host_ms=1, device_ms=0.5)
    assert summary.device_ms == pytest.approx(6)
    assert (summary.kernels, summary.launches, summary.waits) == (2, 2, 1)
    # from the first step's beginning until the device has copied the last result
    assert summary.wall_ms == pytest.approx(31.5 / 2)


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="expected some marked 'step', found none"):
        trace.summarize([event("kernel", "gemm", 0, 1, correlation=1)])


def test_tables_put_the_largest_difference_first():
    calls = {
        "sgd": {"aten::mm": (4, 2.0), "aten::add": (3, 0.5)},
        "fngd steady": {"aten::mm": (4, 2.25), "aten::add": (3, 0.5), "aten::mul": (2, 1.0)},
    }
    table = profile.differences("operator", ("host",), calls, "sgd", "fngd steady")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["operator", "calls, sgd", "calls, fngd steady", "host ms, sgd", "host ms, fngd steady"]
    assert rows[2] == ["aten::mul", "0", "2", "0", "1"]
    assert rows[3] == ["aten::mm", "4", "4", "2", "2.25"]
    assert rows[4][0] == "aten::add"


def test_profile_on_the_cpu(tmp_path, capsys):
    profile.main(["--device=cpu", "--network=transformer", "--steps=2", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    assert (tmp_path / "transformer-eager-sgd.md").read_text() in printed
    report = json.loads((tmp_path / "transformer-eager-sgd.json").read_text())
    assert list(report["summaries"]) == ["sgd", "fngd steady", "fngd solving", "fngd sketched"]
    for name, summary in report["summaries"].items():
        host = {phase: times["host_ms"] for phase, times in summary["phases"].items()}
        assert all(host[phase] > 0 for phase in ("forward", "backward", "update", "zero_grad")), name
        assert (host["set_samples"] > 0) == name.startswith("fngd")
        assert sum(host.values()) <= summary["wall_ms"] * 1.001
    calls = report["operators"]
    assert calls["fngd solving"]["fngd::gram"][0] == pytest.approx(12)
    assert "fngd::gram" not in calls["fngd steady"]
    written = tmp_path / "transformer-eager-sgd-fngd-steady.json.gz"
    assert json.loads(gzip.decompress(written.read_bytes()))["traceEvents"]


def test_tables_of_several_modes_without_traces(monkeypatch, tmp_path):
    # off CUDA, GraphedStep runs every step as it is; so does this stand-in for the base optimizer's graph
    monkeypatch.setattr(contenders, "capture", lambda step, _: step)
    options = [
        "--device=cpu",
        "--network=transformer",
        "--mode",
        "eager",
        "graphed",
        "--steps=1",
        "--no-traces",
    ]
    profile.main([*options, f"--output={tmp_path}"])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f"transformer-{mode}-sgd.{kind}" for mode in ("eager", "graphed") for kind in ("md", "json")
    }
