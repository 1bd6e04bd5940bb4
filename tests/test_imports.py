"""An import only defines things."""

import json
import subprocess
import sys
from pathlib import Path

MODULES = ["train", "evaluate", "augment", "checkpoint", "data", "optim", "model", "config", "utils"]
CODE = """if True:
    import contextlib, io, json, os, random, signal, sys, warnings
    import numpy, thop, torch, tqdm  # what these do when they are imported is not ours
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    os.environ.pop("GOMP_SPINCOUNT", None)
    names = json.loads(sys.argv[1])
    sys.argv = ["train.py", "--no_such_flag"]

    def state():
        return {
            "excepthook": sys.excepthook is sys.__excepthook__,
            "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
            "argv": list(sys.argv),
            "path": list(sys.path),
            "warnings": repr(warnings.filters),
            "files": sorted(os.listdir(".")),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "grad": torch.is_grad_enabled(),
            "dtype": str(torch.get_default_dtype()),
            "random": [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()],
            "environment": dict(os.environ),
        }

    before, results = state(), {}
    for order in [*([name] for name in names), names, names[::-1]]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            for name in order:
                __import__(name)
        after = state()
        results[" ".join(order)] = {
            "changed": [key for key in before if before[key] != after[key] and key != "environment"],
            "environment": sorted(before["environment"].items() ^ after["environment"].items()),
            "printed": printed.getvalue(),
            "slow": sorted({"matplotlib", "torchvision", "torch._dynamo"} & sys.modules.keys()),
        }
        for name in names:
            sys.modules.pop(name, None)
        os.environ.pop("GOMP_SPINCOUNT", None)
    os.environ["GOMP_SPINCOUNT"] = "7"
    import train
    assert os.environ["GOMP_SPINCOUNT"] == "7", "a user's own value stays"
    print(json.dumps(results))
"""


def test_an_import_only_defines_things(tmp_path: Path) -> None:
    """Each file by itself, then all in two orders. Programs set one variable, which OpenMP reads at its start."""
    command = [sys.executable, "-c", CODE, json.dumps(MODULES)]
    environment = {"PYTHONPATH": str(Path().absolute()), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == len(MODULES) + 2
    for order, found in results.items():
        program = {"train", "evaluate"} & set(order.split())
        environment = [["GOMP_SPINCOUNT", "10000"]] if program else []
        assert found == {"changed": [], "environment": environment, "printed": "", "slow": []}, order
