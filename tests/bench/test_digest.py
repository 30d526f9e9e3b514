import json
import re

from bench.report import digest


def test_the_digest_shows_each_kind_of_row(tmp_path, capsys):
    step = {"network": "net", "contender": "fngd steady", "baseline": "sgd", "mode": "graphed", "base": "sgd"}
    kernel = {"gpu": "G", "op": "gram", "dtype": "bfloat16", "network": "n", "layer": "l", "batch": 1}
    kernel |= {"contender": "fngd", "role": "fngd", "median_s": 1.0, "ratio": 0.5, "percent_of_roofline": 40}
    run = {"task": {"title": "CIFAR"}, "config": {"method": "fngd", "lr": 0.1}, "epochs": [{}, {}]}
    run |= {"diverged": False, "validation_score": 91.5, "test_score": 90.25}
    rows = {
        "gpu": [
            step | {"ratio": 1.02, "median_s": 0.003},
            step | {"contender": "sgd", "ratio": 1, "median_s": 1},
        ],
        "peers": [{"network": "net", "contender": "kfac", "ratio": 2.5, "median_s": 0.01}],
        "kernels": [kernel],
        "training": [run],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    digest.main([str(tmp_path)])
    printed = capsys.readouterr().out
    for words in (
        "net: fngd steady graphed sgd 1.020 3.000",
        "net: kfac 2.500 10.000",
        "gram bfloat16 1 0.50",
    ):
        assert words in re.sub(r" +", " ", printed)
    assert "CIFAR: fngd, lr 0.1 2 False 91.500 90.250" in re.sub(r" +", " ", printed)
    assert "net: sgd " not in printed
