from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from hf_accel import LinearToZero, Recipe
from hf_accel.cli import app
from hf_accel.compare import Arm, Comparison, build_workload, cache, compare, execution
from hf_accel.compare.placebos import OTHER_ORDER, bigger_batch_placebo, planned_recipes, random_subset_placebo
from hf_accel.compare.pool import environment, run_jobs
from hf_accel.compare.worker import measure
from hf_accel.compare.workloads import WORKLOADS, Workload

SYNTHETIC = "hf_accel.compare.workloads.synthetic"


@pytest.fixture(autouse=True)
def nothing_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def known_answers(out):
    return Comparison(
        [f"{SYNTHETIC}:{name}" for name in ("SkipsHalf", "DoesNothing", "EndsEarlier")] + ["InfoBatch(keep=0.5)"],
        workload=build_workload("synthetic", {"seconds": 0.7, "noise": 0.015}),
        horizons=(0.375, 0.75, 1.0, 1.5),
        seeds=5,
        out=out,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole comparison, with what it told of its progress; run once, and copied for each worker of pytest."""
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    out = root / "known"
    with FileLock(shared / "known.lock"):
        if not (shared / "known.pickle").exists():
            told: list = []
            results = known_answers(shared / "known-once").run(told.append)
            (shared / "known.pickle").write_bytes(pickle.dumps((results, told)))
        results, told = pickle.loads((shared / "known.pickle").read_bytes())
        shutil.copytree(shared / "known-once", out)
    return results, out, told


@pytest.mark.full  # it measures: an interval of 95 % misses sometimes
@pytest.mark.parametrize("name, answer", [("SkipsHalf", 2.0), ("DoesNothing", 1.0), ("EndsEarlier", 1.0)])
def test_the_known_answers_are_in_their_intervals(name, answer, finished):
    results, _, _ = finished
    found = results.row(name).speed_ups["cpu_seconds"]
    assert found.kind == "measured", found
    assert found.low <= answer <= found.high, found
    assert found.high / found.low < 1.5, "an interval that says something"


@pytest.mark.ci
def test_the_verdicts_are_those_of_the_task(finished):
    results, _, _ = finished
    # Half of the work is certainly worse; the rest is for more seeds to say, as there is more noise than margin.
    assert results.row("EndsEarlier").non_inferiority.verdict == "inferior"
    assert results.row("DoesNothing").non_inferiority.verdict != "inferior"
    assert results.margin == 0.003


@pytest.mark.ci
def test_a_candidate_that_fails_has_infinite_time_and_says_why(finished):
    results, _, _ = finished
    row = results.row("InfoBatch(keep=0.5)")
    found = row.speed_ups["cpu_seconds"]
    assert (found.kind, found.value, found.misses) == ("miss", 0.0, 5)
    assert row.non_inferiority.verdict == "inferior"
    assert "InfoBatch" in row.errors[0] and "loss for each example" in row.errors[0]


@pytest.mark.ci
def test_progress_is_told_from_the_first_run(finished):
    _, _, told = finished
    assert told[0].seconds_left is None and told[0].done == 0
    firsts = [progress.last for progress in told[1:4]]
    assert "baseline, horizon 0.375, seed 1" in firsts, "the shortest run is among those that begin"
    assert all(progress.seconds_left is not None for progress in told[1:])
    assert (told[-1].done, told[-1].total, told[-1].seconds_left) == (81, 81, 0.0)


@pytest.mark.ci
def test_the_reports_are_written(finished):
    _, out, _ = finished
    plain = json.loads((out / "results.json").read_text())
    assert plain["workload"] == "synthetic" and len(plain["runs"]) == 81 and plain["complete"]
    assert plain["rows"][4]["speed_ups"]["cpu_seconds"]["kind"] == "measured"
    report = (out / "report.md").read_text()
    for word in ("Baseline tuned", "SkipsHalf", "miss (5 of 5)", "## Caveats", "Counted in other costs"):
        assert word in report, word
    record = plain["runs"][0]
    assert record["peak_memory_bytes"] > 0 and record["log"] and record["uncharged"]["evaluation"]["cpu_seconds"] > 0


@pytest.mark.ci
def test_an_interrupted_comparison_goes_on_where_it_stopped(finished, monkeypatch):
    results, out, _ = finished
    lost = sorted((out / "runs").glob("baseline-0.375-2-*.json"))
    assert len(lost) == 1
    kept = lost[0].read_text()
    lost[0].unlink()
    asked = []

    def counted(jobs, slots, single_threaded, done, logs):
        for job in jobs:
            asked.append(job["record"])
            (out / "runs" / job["record"].rpartition("/")[2]).write_text(
                kept if "baseline" in job["record"] else json.dumps({"status": "failed", "error": "InfoBatch: no"})
            )
            done(job, 0)

    monkeypatch.setattr(execution, "run_jobs", counted)
    again = known_answers(out).run()
    failed = [record for record in asked if "InfoBatch" in record]
    assert len(failed) == 5 and len(asked) == 6, "what is missing, and what failed"
    assert again.row("SkipsHalf").speed_ups == results.row("SkipsHalf").speed_ups


@pytest.mark.full  # it trains for three quarters of a minute
def test_a_killed_comparison_goes_on_from_its_records(tmp_path):
    script = (
        "from hf_accel.compare import Comparison\n"
        "from hf_accel.compare.workloads.synthetic import Synthetic\n"
        "comparison = Comparison(['LinearToZero'], Synthetic(seconds=0.4), horizons=(0.5, 1.0), seeds=3, out='out')\n"
        "print(len(comparison.run().runs))\n"
    )
    command = [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.Popen(command, env=environment, start_new_session=True)
    while len(list(tmp_path.glob("out/runs/*.json"))) < 3:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    time.sleep(2)  # runs that are under way end, or are lost with their workers
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*.json")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert 3 <= len(kept) < 22 and int(ended.stdout) == 22
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "no run is made twice"


def test_a_comparison_that_is_interrupted_in_its_search_goes_on_from_its_trials(monkeypatch, tmp_path):
    asked = []

    def interrupted(jobs, slots, single_threaded, done, logs):
        for job in jobs:
            if len(asked) == 7:
                asked.append("no more")
                raise KeyboardInterrupt
            asked.append(job["record"])
            costs = dict.fromkeys(("cpu_seconds", "wall_seconds", "flops", "tokens", "samples", "steps"), 64.0)
            record = {"status": "finished", "metrics": {"eval_loss": 2.0}, "costs": costs, "whole_seconds": 1.0}
            rest = {"set_up": {}, "peak_memory_bytes": 2**20, "phases": {}, "log": []}
            Path(job["record"]).write_text(json.dumps({"run": job["run"], **record, **rest}))
            done(job, 0)

    monkeypatch.setattr(execution, "run_jobs", interrupted)
    monkeypatch.setattr(Comparison, "save", lambda self, results: None)

    def comparison():
        return Comparison(["InfoBatch"], workload="synthetic", horizons=(0.5, 1.0), seeds=2, tune=6, out=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        comparison().run()
    sorted(tmp_path.glob("runs/*.json"))[0].write_text('{"status": "fini')  # cut off by a full disk
    results = comparison().run()
    asked.remove("no more")
    assert results.complete and len(results.trials["InfoBatch"]) == 6
    assert len(asked) - len(set(asked)) == 1, "only the record that was cut off is made twice"


@pytest.mark.ci
def test_when_the_time_is_up_whole_seeds_are_reported(finished, monkeypatch, tmp_path):
    _, out, _ = finished
    now = [0.0]
    monkeypatch.setattr(execution.time, "monotonic", lambda: now[0])

    def two_seconds_each(jobs, slots, single_threaded, done, logs):
        for job in jobs:
            now[0] += 2.0
            horizon = float(job["run"]["budget"].removesuffix("samples")) / 64
            like = next((out / "runs").glob(f"baseline-{horizon:g}-1-*.json"))
            Path(job["record"]).write_text(json.dumps(json.loads(like.read_text()) | {"whole_seconds": 2.0}))
            done(job, 0)

    monkeypatch.setattr(execution, "run_jobs", two_seconds_each)
    options = {"workload": "synthetic", "horizons": (0.75, 1.5), "seeds": 5, "placebos": False}
    arm = Arm("half", Recipe(techniques=["LinearToZero"]), horizon=0.75)
    cut = Comparison([arm], **options, budget="17s", out=tmp_path / "cut").run()
    assert cut.seeds == [1, 2] and not cut.complete and now[0] <= 17
    with pytest.raises(ValueError, match="budget\\('3s'\\): too short for the baseline of one seed. Give more time."):
        Comparison([arm], **options, budget="3s", out=tmp_path / "short").run()


def test_a_record_is_of_its_configuration_and_code(monkeypatch):
    run = {"workload": "synthetic", "recipe": {"techniques": [{"InfoBatch": {"keep": 0.5}}]}, "seed": 1}
    key = cache.key(run)
    assert cache.key(dict(run)) == key and cache.key(run | {"seed": 2}) != key
    monkeypatch.setattr(cache, "code_hash", lambda: "other code")
    assert cache.key(run) != key


def test_a_record_is_of_its_machine_and_of_what_files_hold(tmp_path, monkeypatch):
    text, folder = tmp_path / "train.txt", tmp_path / "model"
    text.write_text("some text")
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    def files():
        recipe = Recipe(task="causal-lm", model=str(folder), data={"source": str(text)}, budget="2epochs")
        return Comparison([recipe], seeds=1).plan()[0].configuration["files"]

    first = files()
    assert first == files() != ""
    text.write_text("some other text")
    second = files()
    (folder / "config.json").write_text("{ }")
    assert len({first, second, files()}) == 3
    plain = cache.stamp(
        {"source": "stdlib", "rate": 0.1, "none": None, "empty": "", "long": "x" * 9999, "of": "~no one"}
    )
    assert plain == ""
    one, other = (
        Comparison(["LinearToZero"], workload="code-lm", cost=cost).plan()[0].record(tmp_path)
        for cost in ("cpu_seconds", "wall_seconds")
    )
    assert one != other, "one of them has one thread"
    monkeypatch.setattr(cache, "machine", lambda: "another processor")
    moved = Comparison(["LinearToZero"], workload="code-lm", cost="cpu_seconds").plan()[0].record(tmp_path)
    assert moved != one


# The plan -------------------------------------------------------------------------------------------------------------


def test_seeds_are_whole_and_arms_are_mixed():
    plan = Comparison(["LinearToZero", "LayerFreezing"], workload="code-lm", seeds=3).plan()
    assert [run.seed for run in plan] == sorted(run.seed for run in plan)
    orders = [[(run.arm, run.horizon) for run in plan if run.seed == seed] for seed in (1, 2, 3)]
    assert sorted(orders[1]) == sorted(orders[2]) and orders[1] != orders[2]
    assert orders[0][:2] == [("baseline", 0.25), ("baseline, hosted", 1.0)]
    assert sorted(orders[0]) == sorted([*orders[1], ("baseline, hosted", 1.0)])
    assert len(orders[1]) == 5 + 2 + 3 + 5, "the baseline, two candidates, their placebos, and Trainer's defaults"
    budgets = {run.horizon: run.configuration["budget"] for run in plan if run.arm == "baseline"}
    assert budgets == {
        0.25: "600samples",
        0.5: "1200samples",
        0.75: "1800samples",
        1.0: "2400samples",
        1.5: "3600samples",
    }


def test_candidates_inherit_what_they_do_not_say():
    recipe = Recipe(args={"learning_rate": 1e-2}, techniques=[LinearToZero(warmup=0.1)])
    comparison = Comparison([Arm("fast", recipe)], workload="code-lm")
    args = comparison.arms[0].recipe.args
    batch_size = comparison.reference.recipe.args["per_device_train_batch_size"]
    assert args["learning_rate"] == 1e-2 and args["per_device_train_batch_size"] == batch_size
    assert "warmup_steps" not in args, "the technique is the schedule"
    own = Comparison(["Muon"], workload="code-lm", baseline=Recipe(args={"optim": "adafactor"}))
    assert own.reference.recipe.args["optim"] == "adafactor" and "optim" not in own.arms[0].recipe.args
    plan = {run.arm: run.configuration["recipe"] for run in comparison.plan()}
    placebo = plan["baseline, LR of fast"]
    assert placebo["args"] == comparison.reference.recipe.args | {"learning_rate": 1e-2} and "techniques" not in placebo
    assert plan["baseline, another order of fast"]["args"].items() > comparison.reference.recipe.args.items()
    without = Comparison([Arm("fast", recipe)], workload="code-lm", placebos=False)
    assert {run.arm for run in without.plan()} == {"baseline", "baseline, hosted", "fast"}


def test_candidates_may_have_a_share_of_the_budget():
    plan = Comparison(["LinearToZero"], workload="code-lm", seeds=1, horizons=(0.5, 1.0), share=0.5).plan()
    budgets = {(run.arm, run.horizon): run.configuration["budget"] for run in plan}
    assert budgets["LinearToZero", 0.5] == budgets["baseline", 0.5] == budgets["Trainer's defaults", 0.5]
    assert budgets["LinearToZero", 0.5] == budgets["baseline, another order of LinearToZero", 0.5]
    message = "share\\(0.6\\): is none of the horizons \\(0.5, 1\\). Use one of them, or add it."
    for candidate, share in (("LinearToZero", 0.6), (Arm("half", Recipe(), horizon=0.6), 0.5)):
        with pytest.raises(ValueError, match=message):
            Comparison([candidate], workload="code-lm", horizons=(0.5, 1.0), share=share)


def test_ablations_leave_out_one_technique_each():
    recipe = Recipe(techniques=["LayerFreezing", "ExponentialMovingAverage"])
    plan = Comparison([Arm("both", recipe)], workload="code-lm", ablate=True, seeds=1).plan()
    left = {run.arm: run.configuration["recipe"]["techniques"] for run in plan if " without " in run.arm}
    assert left == {
        "both without LayerFreezing": [{"ExponentialMovingAverage": {}}],
        "both without ExponentialMovingAverage": [{"LayerFreezing": {}}],
    }


def test_every_candidate_has_placebos_for_what_it_changes():
    baseline = Recipe(args={"learning_rate": 1e-3, "per_device_train_batch_size": 2, "warmup_steps": 0.1})
    order = {"another order": baseline.args | {"data_seed": OTHER_ORDER}}

    def args(*techniques, **changed):
        found = planned_recipes(Recipe(args=baseline.args | changed, techniques=list(techniques)), baseline)
        assert not any(recipe.techniques for recipe in found.values()), "the baseline's method"
        return {label: recipe.args for label, recipe in found.items()}

    assert args("LengthGrouped") == order == args(learning_rate=1e-2), "never none; without techniques, it is the arm"
    changed = {"learning_rate": 2e-2, "per_device_train_batch_size": 8, "warmup_steps": 0.03}
    labels = dict(zip(changed, ("LR", "batch", "warm-up"), strict=True))
    alone = {labels[name]: baseline.args | {name: value} for name, value in changed.items()}
    assert args("Muon", **changed) == order | alone | {"arguments": baseline.args | changed}
    assert args("Muon", weight_decay=0.1) == order | {"arguments": baseline.args | {"weight_decay": 0.1}}
    assert args("Muon", per_device_train_batch_size=8) == order | {"batch": alone["batch"]}
    assert args({"LinearToZero": {"warmup": 0.3}}) == order | {"warm-up": baseline.args | {"warmup_steps": 0.3}}


def test_placebos_have_the_size_of_the_candidate():
    pruned, plain = Recipe(techniques=["InfoBatch"]), Recipe(args={"per_device_train_batch_size": 8})
    assert random_subset_placebo(pruned, plain, 0.7).techniques[0].popitem()[1] == {"keep": 0.7}
    assert random_subset_placebo(pruned, plain, 0.99) is None
    assert random_subset_placebo(Recipe(techniques=["LayerFreezing"]), plain, 0.7) is None
    assert bigger_batch_placebo(plain, 1.5).args["per_device_train_batch_size"] == 12
    assert bigger_batch_placebo(plain, 1.05) is None


def test_a_recipe_with_data_is_a_workload_and_not_tuned():
    recipe = Recipe(task="causal-lm", model={"config": {"model_type": "llama"}}, data={"source": "x"}, budget="2epochs")
    comparison = Comparison([recipe], seeds=1)
    assert comparison.workload.name == "recipe" and comparison.tuned == ""
    assert comparison.plan()[0].configuration["options"]["data"] == {"source": "x"}
    assert {run.configuration["budget"] for run in comparison.plan() if run.arm != "baseline"} == {"2epochs"}
    arms = {"baseline", "baseline, hosted", "candidate", "baseline, another order of candidate"}
    assert {run.arm for run in comparison.plan()} == arms


def test_the_baseline_of_a_recipe_is_the_recipe_without_techniques():
    args = {"learning_rate": 1e-2, "bf16": False, "optim": "adafactor"}
    data = {"task": "causal-lm", "model": {"config": {}}, "budget": "2epochs"}
    comparison = Comparison([Recipe(args=args, techniques=["Muon"], **data)], seeds=1)
    plan = {run.arm: run.configuration["recipe"] for run in comparison.plan()}
    assert plan["baseline"] == {"args": args}
    assert plan["Muon"] == {"args": args, "techniques": [{"Muon": {}}]}
    assert plan["Trainer's defaults"] == {"args": {"bf16": False}}


def test_placebos_of_a_measured_size_are_shuffled_into_the_seeds_after_the_first(monkeypatch, tmp_path):
    asked = []

    def half_the_samples(jobs, slots, single_threaded, done, logs):
        for job in jobs:
            asked.append((job["record"].rpartition("/")[2], job["run"]["seed"]))
            samples = 32.0 if "InfoBatch" in job["record"] else 64.0
            costs = dict.fromkeys(("cpu_seconds", "wall_seconds", "flops", "tokens", "samples", "steps"), samples)
            record = {"status": "finished", "metrics": {"eval_loss": 1 / job["run"]["seed"]}, "costs": costs}
            rest = {"set_up": {}, "peak_memory_bytes": 2**20, "phases": {}, "log": [], "whole_seconds": 1.0}
            Path(job["record"]).write_text(json.dumps({"run": job["run"], **record, **rest}))
            done(job, 0)

    monkeypatch.setattr(execution, "run_jobs", half_the_samples)
    monkeypatch.setattr(Comparison, "save", lambda self, results: None)
    told = []
    results = Comparison(["InfoBatch"], workload="synthetic", horizons=(0.5, 1.0), seeds=4, out=tmp_path).run(
        told.append
    )
    assert results.complete and (told[1].total, told[-1].done, told[-1].total) == (25, 29, 29)
    where = [(index, seed) for index, (name, seed) in enumerate(asked) if name.startswith("random-subset")]
    assert [seed for _, seed in where] == [1, 2, 3, 4]
    assert [seed for _, seed in asked] == [1] * 8 + [2] * 7 + [3] * 7 + [4] * 7
    assert where[0][0] == 7 and {index % 7 for index, _ in where[1:]} != {0}, "not always the last of its seed"
    assert results.row("random subset, as InfoBatch").techniques == [{"RandomSubset": {"keep": 0.5}}]


@pytest.mark.parametrize("name", ["digits"])
def test_a_workload_trains(name):
    run = {
        "workload": name,
        "options": {},
        "recipe": {"args": build_workload(name).baseline_args(), "techniques": []},
        "budget": "64samples",
        "seed": 1,
    }
    steps = 64 / run["recipe"]["args"]["per_device_train_batch_size"]
    plain = measure(run)
    hosted = measure(run | {"recipe": run["recipe"] | {"techniques": ["LayerFreezing"]}})
    for record in (plain, hosted):
        assert record["status"] == "finished" and record["costs"]["steps"] == steps and record["costs"]["samples"] == 64
        assert record["set_up"]["cpu_seconds"] < record["costs"]["cpu_seconds"]
        assert record["peak_memory_bytes"] < 2**28, "what training takes, not the imports"
    assert 0 <= plain["metrics"]["eval_accuracy"] <= 1
    assert not plain["phases"] and hosted["phases"]["forward"] > 0


@pytest.mark.parametrize(
    ("name", "strategy"), [("digits", "random"), pytest.param("code-lm", "group_by_length", marks=pytest.mark.full)]
)
def test_another_order_is_another_one_for_each_seed(name, strategy):
    run = {"workload": name, "options": {}, "budget": "128samples", "seed": 3}
    args = build_workload(name).baseline_args() | {"train_sampling_strategy": strategy}
    losses = [
        measure(run | {"recipe": {"args": args | order, "techniques": []}})["metrics"]["eval_loss"]
        for order in ({}, {"data_seed": 0}, {"data_seed": OTHER_ORDER})
    ]
    assert losses[0] == losses[1] != losses[2], "the worker adds the seed of the run"


def test_workloads_say_what_they_need(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ACCEL_DATA", str(tmp_path))
    assert "there is no such file. Set HF_ACCEL_DATA, or --data" in build_workload("novels-lm").missing()
    for name, kind in WORKLOADS.items():
        assert kind.name == name and issubclass(kind, Workload)
        kind().nominal_budget()
        Recipe(args=kind().baseline_args()).training_arguments()


@pytest.mark.parametrize("finished_before", [0, 1])
def test_only_a_baseline_that_never_finishes_ends_a_comparison(finished_before, monkeypatch, tmp_path):
    def failing(jobs, slots, single_threaded, done, logs):
        for number, job in enumerate(jobs):
            costs = dict.fromkeys(("cpu_seconds", "wall_seconds", "flops", "tokens", "samples", "steps"), 64.0)
            record = {"status": "finished", "metrics": {"eval_loss": 2.0}, "costs": costs, "whole_seconds": 1.0}
            rest = {"set_up": {}, "peak_memory_bytes": 2**20, "phases": {}, "log": []}
            lost = number == finished_before
            record = {"status": "failed", "error": "MemoryError.", "whole_seconds": 1.0} if lost else record | rest
            Path(job["record"]).write_text(json.dumps({"run": job["run"], **record}))
            done(job, 0)

    monkeypatch.setattr(execution, "run_jobs", failing)
    comparison = Comparison(["LinearToZero"], workload="synthetic", seeds=1, placebos=False, out=tmp_path)
    plan = sorted(comparison.plan(), key=lambda run: run.arm != "baseline")
    monkeypatch.setattr(Comparison, "plan", lambda self: plan)
    if finished_before:
        results = comparison.run()
        assert [len(row.errors) for row in results.rows if row.name == "baseline"].count(1) == 1
        assert "MemoryError." in (tmp_path / "report.md").read_text()
    else:
        with pytest.raises(ValueError, match="baseline: a run failed, MemoryError. See .*.log."):
            comparison.run()


def test_a_worker_that_dies_is_an_error_not_a_wait(monkeypatch, tmp_path):
    (tmp_path / "dying").write_text("#!/bin/sh\necho 'no memory' >&2\nexit 1\n")
    (tmp_path / "dying").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "dying"))
    with pytest.raises(RuntimeError, match="a worker has died. See .*worker-1.log and a-run.log"):
        run_jobs([{"log": "a-run.log"}], 1, True, lambda job, status: None, tmp_path)
    assert (tmp_path / "worker-1.log").read_text() == "no memory\n"


def test_every_slot_has_one_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [environment(False, slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    assert all("CUDA_VISIBLE_DEVICES" not in environment(False, 1, gpus) for gpus in (0, 1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8932f937")
    assert [environment(False, slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["3", "GPU-8932f937"]


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["none.yaml", "--workload", "digits"], "recipe('none.yaml'): there is no such file."),
        (["InfoBtch", "--workload", "digits"], "Did you mean 'InfoBatch'?"),
        (["InfoBatch(keep=2.0)", "--workload", "digits"], "keep must be"),
        (["InfoBatch", "--workload", "digit"], "workload('digit'): there is none of this name. Did you mean 'digits'?"),
        (["InfoBatch"], "workload: none is named, and the recipe has no task and model. Add --workload NAME."),
        (["InfoBatch", "--workload", "novels-lm", "--data", "none"], "there is no such file. Set HF_ACCEL_DATA"),
        (["InfoBatch", "--workload", "digits", "--horizons", "1,x"], "horizons('1,x'): must be numbers."),
        (["InfoBatch", "--workload", "digits", "--horizons", "1"], "must be two or more above 0."),
        (["InfoBatch", "--workload", "digits", "--budget", "20steps"], "budget('20steps'): must be a time."),
        (["InfoBatch", "--workload", "digits", "--share", "0.6"], "share(0.6): is none of the horizons (0.25, 0.5,"),
        (["--workload", "digits"], "candidates: there are none."),
        (["InfoBatch", "InfoBatch", "--workload", "digits"], "two have the same name"),
        (["InfoBatch", "--workload", "digits", "--baseline", "no.yaml"], "recipe('no.yaml'): there is no such file."),
    ],
)
def test_bad_input_ends_in_one_sentence_and_exit_code_2(line, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ACCEL_DATA", "elsewhere")
    result = CliRunner().invoke(app, ["compare", *line])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.ci
def test_the_command_prints_what_python_returns(monkeypatch, finished):
    results, _, _ = finished
    monkeypatch.setattr(Comparison, "run", lambda self, progress: results)
    line = ["compare", "LayerFreezing", "--workload", "synthetic", "--seeds", "2"]
    shown = CliRunner().invoke(app, line, env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "Speed-up" in shown.output and "SkipsHalf" in shown.output
    plain = CliRunner().invoke(app, [*line, "--json"])
    assert json.loads(plain.stdout) == results.to_dict()
    tuning = CliRunner().invoke(app, ["compare", "--workload", "synthetic", "--tune", "8"])
    assert tuning.exit_code == 0, tuning.output
    monkeypatch.setattr(Comparison, "run", lambda self: results)
    assert compare("LayerFreezing", workload="synthetic") is results
