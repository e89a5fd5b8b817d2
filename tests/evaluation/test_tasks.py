"""Zero-shot tasks: the harness's scores against our own, local data, and every way a request can be wrong."""

from __future__ import annotations

import json
import math
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="zero-shot tasks need the extra eval")

from cospadi.calibration.data import builtin_text
from cospadi.checkpoint.load import load
from cospadi.cli import app
from cospadi.errors import CospadiError, InputError
from cospadi.evaluation import harness as harness_module
from cospadi.evaluation import tasks as tasks_module
from cospadi.evaluation.harness import task_manager
from cospadi.evaluation.tasks import check_tasks, evaluate_tasks
from tiny_models import make_model

ALL = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "lambada_openai", "winogrande")
N_ITEMS = 20


def phrases():
    """Yield ever new pieces of prose of 3 to 11 words."""
    words = [word for word in builtin_text("evaluation").split() if word.isalpha()]
    position = 0
    while True:
        length = 3 + position % 9
        yield " ".join(words[position : position + length])
        position += length


def rows_of(task):
    """Return N_ITEMS items in the columns of the task's hub data set."""
    text = phrases()
    for number in range(N_ITEMS):
        if task == "piqa":
            yield {"goal": next(text), "sol1": next(text), "sol2": next(text), "label": number % 2}
        elif task == "hellaswag":
            row = {"activity_label": next(text), "ctx_a": next(text), "ctx_b": next(text)}
            endings = [next(text) + " [step] " + next(text) for _ in range(4)]
            yield row | {"endings": endings, "label": str(number % 4)}
        elif task in ("arc_easy", "arc_challenge"):
            n = 3 + number % 3  # items differ in the number of choices
            labels = ["A", "B", "C", "D", "E"][:n] if number % 2 else ["1", "2", "3", "4", "5"][:n]
            choices = {"text": [next(text) for _ in range(n)], "label": labels}
            yield {"question": next(text), "choices": choices, "answerKey": labels[number % n]}
        elif task == "lambada_openai":
            yield {"text": next(text) + (" the" if number % 3 else " end")}
        elif task == "winogrande":
            row = {"sentence": f"{next(text)} _ {next(text)}.", "option1": next(text)}
            yield row | {"option2": next(text), "answer": str(1 + number % 2)}


FILES = {
    "piqa": "piqa_validation.jsonl",
    "hellaswag": "hellaswag_validation.jsonl",
    "arc_easy": "arc_easy_test.jsonl",
    "arc_challenge": "arc_challenge_test.jsonl",
    "lambada_openai": "lambada_openai_test.jsonl",
    "winogrande": "winogrande_xl_validation.jsonl",
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """A folder with all tasks' files."""
    folder = tmp_path_factory.mktemp("tasks") / "task data"
    folder.mkdir()
    for task, name in FILES.items():
        lines = [json.dumps(row) for row in rows_of(task)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model():
    """A tiny Llama with room for the longest prompts."""
    model = make_model("llama")
    model.config.max_position_embeddings = 512
    return model


def questions(task, row):
    """Return (contexts, continuations, lengths of the choices, right choice) of one item, from the task's paper."""
    if task == "piqa":
        choices, gold = [row["sol1"], row["sol2"]], row["label"]
        contexts = [f"Question: {row['goal']}\nAnswer:"] * 2
    elif task == "winogrande":  # the options complete the beginning; the common end is scored
        begin, end = row["sentence"].split("_")
        choices = [begin + row["option1"], begin + row["option2"]]
        return choices, [" " + end.strip()] * 2, [1, 1], int(row["answer"]) - 1
    else:
        choices, gold = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
        contexts = [f"Question: {row['question']}\nAnswer:"] * len(choices)
    return contexts, [" " + choice for choice in choices], [len(c) for c in choices], gold


def log_likelihood(model, tokenizer, context, continuation):
    """Return the log likelihood in fp64, one sequence at a time, and whether it is the greedy continuation."""
    n_context = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    target = ids[0, n_context:]
    log_p = log_p[n_context - 1 :]
    is_greedy = bool((log_p.argmax(-1) == target).all())
    return log_p.gather(1, target[:, None]).sum().item(), is_greedy


def argmax(values):
    return max(range(len(values)), key=values.__getitem__)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("task", ["piqa", "arc_easy", "winogrande"])
def test_equals_our_own_scoring(task, bos, model, tiny_tokenizer, tiny_tokenizer_bos, data_dir):
    tokenizer = tiny_tokenizer_bos if bos else tiny_tokenizer
    acc, acc_norm = [], []
    for row in rows_of(task):
        contexts, continuations, lengths, gold = questions(task, row)
        values = [
            log_likelihood(model, tokenizer, *pair)[0]
            for pair in zip(contexts, continuations, strict=True)
        ]
        acc.append(float(argmax(values) == gold))
        normalised = [v / n for v, n in zip(values, lengths, strict=True)]
        acc_norm.append(float(argmax(normalised) == gold))
    result = evaluate_tasks(model, tokenizer, [task], data_dir=data_dir).tasks[task]
    assert result.acc == statistics.mean(acc)
    assert result.acc_stderr == pytest.approx(statistics.stdev(acc) / N_ITEMS**0.5)
    assert (result.items, result.items_available) == (N_ITEMS, N_ITEMS)
    if task == "winogrande":  # defines no normalised accuracy
        assert (result.metric, result.acc_norm, result.acc_norm_stderr) == ("acc", None, None)
        assert list(result.item_scores) == acc
    else:
        assert acc != acc_norm  # the items tell the two apart
        assert list(result.item_scores) == acc_norm
        assert (result.metric, result.acc_norm) == ("acc_norm", statistics.mean(acc_norm))
        assert result.acc_norm_stderr == pytest.approx(statistics.stdev(acc_norm) / N_ITEMS**0.5)
    assert result.value == statistics.mean(result.item_scores)
    assert result.warnings == ()


def test_lambada_is_greedy_accuracy_with_a_perplexity(tiny_tokenizer, data_dir):
    # a model with a strong wish to say " the" gets exactly the items that end so
    model = make_model("llama")
    (the,) = tiny_tokenizer(" the")["input_ids"]

    def insist(_module, _args, logits):
        logits = logits.clone()
        logits[..., the] += 30
        return logits

    model.lm_head.register_forward_hook(insist)
    texts = [row["text"] for row in rows_of("lambada_openai")]
    values = [
        log_likelihood(model, tiny_tokenizer, *(text[: text.rindex(" ")], text[text.rindex(" ") :]))
        for text in texts
    ]
    result = evaluate_tasks(model, tiny_tokenizer, ["lambada_openai"], data_dir=data_dir)
    found = result.tasks["lambada_openai"]
    assert list(found.item_scores) == [float(greedy) for _, greedy in values]
    assert found.acc == sum(text.endswith(" the") for text in texts) / N_ITEMS
    wanted = math.exp(-statistics.mean(value for value, _ in values))
    assert found.perplexity == pytest.approx(wanted, rel=1e-5)


def test_all_tasks_offline_and_reproducibly(model, tiny_tokenizer, data_dir, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("network access")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model.train()
    progress = []
    first = evaluate_tasks(
        model, tiny_tokenizer, ALL, data_dir=data_dir, progress=lambda *a: progress.append(a)
    )
    assert model.training
    model.eval()
    second = evaluate_tasks(model, tiny_tokenizer, ALL, data_dir=data_dir, batch_size=3)
    assert tuple(first.tasks) == ALL
    for task in ALL:
        one, other = first.tasks[task], second.tasks[task]
        assert one.item_scores == other.item_scores
        assert one.items_sha256 == other.items_sha256
        assert len(one.item_scores) == one.items == N_ITEMS
        counts = [(done, total) for name, done, total in progress if name == task]
        assert counts[-1][0] == counts[-1][1]
        assert counts == sorted(counts)
    hashes = {task: result.items_sha256 for task, result in first.tasks.items()}
    assert hashes["arc_easy"] == hashes["arc_challenge"]  # the same rows under the same definition
    assert len(set(hashes.values())) == len(ALL) - 1
    assert first.average == pytest.approx(statistics.mean(r.value for r in first.tasks.values()))
    variance = sum(result.stderr**2 for result in first.tasks.values())
    assert first.average_stderr == pytest.approx(variance**0.5 / len(ALL))
    assert (first.data, first.limit, first.batch_size) == ("task data", None, 8)


def test_limit_takes_the_first_items(model, tiny_tokenizer, data_dir):
    full = evaluate_tasks(model, tiny_tokenizer, ["piqa"], data_dir=data_dir).tasks["piqa"]
    results = evaluate_tasks(model, tiny_tokenizer, ["piqa"], data_dir=data_dir, limit=7)
    part = results.tasks["piqa"]
    assert part.item_scores == full.item_scores[:7]
    assert (part.items, part.items_available, results.limit) == (7, N_ITEMS, 7)
    assert part.items_sha256 != full.items_sha256
    single = evaluate_tasks(model, tiny_tokenizer, ["piqa"], data_dir=data_dir, limit=1)
    assert single.tasks["piqa"].stderr is None and single.average_stderr is None


def test_result_is_plain_json_and_the_tokenizer_is_untouched(model, data_dir):
    from tiny_models import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    results = evaluate_tasks(model, tokenizer, ["piqa"], data_dir=data_dir)
    assert tokenizer.pad_token is None  # the harness sets one on what it is given
    data = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    piqa = data["tasks"]["piqa"]
    for key in ("value", "stderr", "metric", "acc", "acc_norm", "items", "version"):
        assert piqa[key] == getattr(results.tasks["piqa"], key)
    assert len(piqa["item_scores"]) == N_ITEMS
    assert data["task_average"] == piqa["value"] and data["task_data"] == "task data"
    assert {"lm_eval", "datasets", "torch", "transformers", "cospadi"} <= set(data["versions"])


def test_random_state_of_the_caller_is_kept(model, tiny_tokenizer, data_dir):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    evaluate_tasks(model, tiny_tokenizer, ["piqa"], data_dir=data_dir, limit=2)
    assert torch.equal(torch.rand(3), wanted)


def test_half_precision_likelihoods_are_computed_in_fp32(tiny_tokenizer, data_dir, model):
    # in bf16 a log likelihood of -100 has steps of 0.5, and choices tie
    rows = list(rows_of("piqa"))
    half = make_model("llama").bfloat16()
    half.config.max_position_embeddings = 512
    scores = []
    for row in rows:
        contexts, continuations, lengths, gold = questions("piqa", row)
        pairs = zip(contexts, continuations, strict=True)
        values = [log_likelihood(half, tiny_tokenizer, *pair)[0] for pair in pairs]
        scores.append(float(argmax([v / n for v, n in zip(values, lengths, strict=True)]) == gold))
    result = evaluate_tasks(half, tiny_tokenizer, ["piqa"], data_dir=data_dir, batch_size=1)
    assert list(result.tasks["piqa"].item_scores) == scores
    assert result.dtype == "bfloat16"


# ---- what the harness would pass over in silence ---------------------------------------------------


def test_non_finite_model_is_an_error(tiny_tokenizer, data_dir):
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda _m, _a, logits: logits * float("nan"))
    with pytest.raises(
        CospadiError, match=r"task 'piqa': the log likelihood of .* is nan"
    ) as caught:
        evaluate_tasks(model, tiny_tokenizer, ["piqa"], data_dir=data_dir)
    assert not isinstance(caught.value, InputError)


def write_task(folder, task, rows):
    folder.mkdir(exist_ok=True)
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    (folder / FILES[task]).write_text(text, encoding="utf-8")
    return folder


def test_cut_prompts_are_reported(tiny_tokenizer, tmp_path):
    rows = list(rows_of("piqa"))
    rows[0]["goal"] = builtin_text("evaluation")[:4000]
    rows[1]["goal"] = builtin_text("evaluation")[:4000]
    folder = write_task(tmp_path / "data", "piqa", rows)
    model = make_model("llama")
    result = evaluate_tasks(model, tiny_tokenizer, ["piqa"], data_dir=folder).tasks["piqa"]
    (cut,) = result.warnings
    assert "exceeds model's maximum length (128)" in cut and cut.endswith("[4 times]")
    assert result.items == N_ITEMS


def test_an_answer_beyond_the_context_is_an_error(tiny_tokenizer, tmp_path):
    rows = list(rows_of("piqa"))
    rows[3]["sol2"] = builtin_text("evaluation")[:4000]
    folder = write_task(tmp_path / "data", "piqa", rows)
    with pytest.raises(InputError, match=r"task 'piqa': the answer .* tokens, expected 1 to 128"):
        evaluate_tasks(make_model("llama"), tiny_tokenizer, ["piqa"], data_dir=folder)


# ---- bad input -------------------------------------------------------------------------------------


def piqa_rows(**changes):
    row = {"goal": "to sit", "sol1": "take a chair", "sol2": "take the floor", "label": 0}
    return {key: value for key, value in (row | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "piqa_validation.jsonl holds no item"),
        (["{\n"], "line 1 is not valid JSON"),
        ([piqa_rows(), "\n", "[1]\n"], "line 3 must be a JSON object"),
        ([piqa_rows(), piqa_rows(extra=1)], "line 2 has the fields"),
        ([piqa_rows(), piqa_rows(label="one")], "a column must have one type"),
        ([piqa_rows(label=None)], "does not fit .* answer 'label' is none of the 2 choices"),
        ([piqa_rows(), piqa_rows(sol1="")], "item 2, does not fit .* an empty choice"),
        ([piqa_rows(), piqa_rows(label=2)], "item 2, does not fit .* answer 2 is none of the 2"),
        ([piqa_rows(label=-1)], "item 1, does not fit .* answer -1 is none of the 2 choices"),
    ],
)
def test_bad_files(rows, match, model, tiny_tokenizer, tmp_path):
    folder = write_task(tmp_path / "data", "piqa", rows)
    with pytest.raises(InputError, match=match):
        evaluate_tasks(model, tiny_tokenizer, ["piqa"], data_dir=folder)


def test_the_item_that_does_not_fit_is_named(model, tiny_tokenizer, tmp_path):
    rows = list(rows_of("arc_easy"))
    rows[4]["answerKey"] = "X"
    folder = write_task(tmp_path / "data", "arc_easy", rows)
    with pytest.raises(InputError, match=r"arc_easy_test.jsonl, item 5, does not fit .*ValueError"):
        evaluate_tasks(model, tiny_tokenizer, ["arc_easy"], data_dir=folder)
    part = evaluate_tasks(model, tiny_tokenizer, ["arc_easy"], data_dir=folder, limit=4)
    assert part.tasks["arc_easy"].items == 4


def test_not_utf8(model, tiny_tokenizer, tmp_path):
    (tmp_path / FILES["piqa"]).write_bytes(b'{"goal": "\xff"}\n')
    with pytest.raises(InputError, match="is not UTF-8"):
        evaluate_tasks(model, tiny_tokenizer, ["piqa"], data_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tasks": ["piqa"], "limit": 0}, "limit: expected at least 1, got 0"),
        ({"tasks": ["piqa"], "batch_size": 0}, "batch_size: expected at least 1"),
        ({"tasks": []}, "at least one task name"),
        ({"tasks": "piqa"}, "a sequence of"),
        ({"tasks": ["piqa", "piqa"]}, "expected each task once, got piqa"),
    ],
)
def test_bad_arguments(arguments, match, model, tiny_tokenizer, data_dir):
    with pytest.raises(InputError, match=match):
        evaluate_tasks(model, tiny_tokenizer, **arguments, data_dir=data_dir)


def test_names(data_dir, tmp_path):
    """Unknown names, tags and groups; one test, since each needs the index of all tasks (12 s once)."""
    with pytest.raises(InputError, match=r"no task 'piqqa': did you mean .*\bpiqa\b"):
        check_tasks(["piqqa"], data_dir=data_dir)
    assert check_tasks(["ai2_arc"], data_dir=data_dir) == ("arc_challenge", "arc_easy")
    with pytest.raises(InputError, match="expected each task once, got arc_easy"):
        check_tasks(["ai2_arc", "arc_easy"])
    assert check_tasks(["mmlu"]) == ("mmlu",)
    with pytest.raises(InputError, match="'mmlu' is a group of tasks and cannot read a local file"):
        check_tasks(["mmlu"], data_dir=data_dir)
    complete = task_manager(("mmlu",))
    quick = task_manager(ALL)
    assert len(quick.all_tasks) < 1000 < len(complete.all_tasks)
    for name in ALL:  # the short way finds the same definitions
        assert quick.task_index[name].yaml_path == complete.task_index[name].yaml_path
        assert quick.task_index[name].cfg == complete.task_index[name].cfg


def test_missing_files(data_dir, tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        check_tasks(["piqa"], data_dir=tmp_path / "no")
    with pytest.raises(
        InputError, match=r"needs piqa_validation.jsonl in .*, which holds no .jsonl"
    ):
        check_tasks(["piqa"], data_dir=tmp_path)
    with pytest.raises(InputError, match=r"needs sciq_test.jsonl in task data, .* arc_easy_test.j"):
        check_tasks(["piqa", "sciq"], data_dir=data_dir)
    with pytest.raises(InputError, match=r"winogrande_validation.jsonl or winogrande_xl_valida"):
        check_tasks(["winogrande"], data_dir=tmp_path)


@pytest.mark.parametrize(
    ("task", "file", "row", "match"),
    [
        ("gsm8k", "gsm8k_test.jsonl", {"question": "1?", "answer": "#### 1"}, "generate_until"),
        ("wikitext", "wikitext_test.jsonl", {"page": "some words"}, "loglikelihood_rolling"),
    ],
)
def test_tasks_without_an_accuracy(task, file, row, match, model, tiny_tokenizer, tmp_path):
    (tmp_path / file).write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"no zero-shot accuracy by likelihood: .*{match}"):
        evaluate_tasks(model, tiny_tokenizer, [task], data_dir=tmp_path)


def test_without_the_hub_the_error_says_what_to_do(model, tiny_tokenizer):
    with pytest.raises(InputError, match=r"task 'piqa': .* hub .*--task-data"):
        evaluate_tasks(model, tiny_tokenizer, ["piqa"])


def test_missing_package(monkeypatch):
    monkeypatch.setattr(harness_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "accelerate.*" "lm-eval>='):
        check_tasks(["piqa"])


def test_a_failure_of_the_harness_names_the_task(model, tiny_tokenizer, data_dir, monkeypatch):
    import lm_eval

    def fail(**_options):
        raise RuntimeError("out of something")

    monkeypatch.setattr(lm_eval, "evaluate", fail)
    with pytest.raises(CospadiError, match=r"task 'piqa': .*RuntimeError: out of something"):
        evaluate_tasks(model, tiny_tokenizer, ["piqa"], data_dir=data_dir)


# ---- groups and definitions that load their data themselves ----------------------------------------


@pytest.fixture
def own_definitions(tmp_path, data_dir, monkeypatch):
    """Definitions of two tasks that load files, and of groups of them, in place of the installed ones."""
    from lm_eval.tasks import TaskManager

    common = (
        "dataset_path: json\noutput_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "Q: {{goal}}\\nA:"\ndoc_to_target: label\ndoc_to_choice: "{{[sol1, sol2]}}"\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "metadata: {version: 3}\n"
    )
    rows = list(rows_of("piqa"))
    for name, part in {"small": rows[:5], "large": rows[5:]}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_kwargs:\n  data_files: {{validation: {path}}}\n"
            f"  cache_dir: {tmp_path / 'cache'}\n{common}"
        )
    (tmp_path / "shots.yaml").write_text("include: small.yaml\ntask: shots\nnum_fewshot: 2\n")
    for name, weighted in {"by_items": "true", "by_task": "false"}.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"group: {name}\ntask: [small, large]\nmetadata: {{version: 7}}\n"
            f"aggregate_metric_list:\n  - {{metric: acc, weight_by_size: {weighted}}}\n"
        )
    (tmp_path / "loose.yaml").write_text("group: loose\ntask: [small, large]\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(tasks_module, "task_manager", lambda names: manager)


def test_groups_count_once(own_definitions, model, tiny_tokenizer):
    leaves = evaluate_tasks(model, tiny_tokenizer, ["small", "large"]).tasks
    small, large = leaves["small"], leaves["large"]
    assert (small.items, large.items, small.version) == (5, 15, "3")
    results = evaluate_tasks(model, tiny_tokenizer, ["by_items", "by_task"])
    by_items, by_task = results.tasks["by_items"], results.tasks["by_task"]
    assert by_items.item_scores == by_task.item_scores == small.item_scores + large.item_scores
    assert by_items.value == pytest.approx(statistics.mean(by_items.item_scores))
    assert by_task.value == pytest.approx((small.value + large.value) / 2)
    assert by_task.stderr == pytest.approx(math.hypot(small.stderr, large.stderr) / 2)
    parts = [small.item_scores, large.item_scores]
    pooled = sum(statistics.variance(p) * (len(p) - 1) for p in parts) / (N_ITEMS - 2)
    assert by_items.stderr == pytest.approx((pooled / N_ITEMS) ** 0.5)
    assert (by_items.metric, by_items.items, by_items.version) == ("acc", N_ITEMS, "7")
    assert results.data == "hub"


def test_groups_and_prompts_that_cannot_be_measured(own_definitions, model, tiny_tokenizer):
    with pytest.raises(InputError, match="group 'loose' defines no accuracy of its own"):
        evaluate_tasks(model, tiny_tokenizer, ["loose"])
    with pytest.raises(InputError, match="puts 2 examples into the prompt"):
        evaluate_tasks(model, tiny_tokenizer, ["shots"])


# ---- command line ----------------------------------------------------------------------------------


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cospadi", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_compressed_model_by_command(
    cli, tiny_model_dir, tiny_text, tiny_tokenizer, data_dir, tmp_path
):
    small, out = tmp_path / "small", tmp_path / "result.json"
    options = ["--samples", 8, "--sequence-length", 64, "--iterations", 1, "--ratio", 0.3]
    dense = tiny_model_dir("llama")
    assert cli("compress", dense, "--out", small, "--calibration", tiny_text, *options)[0] == 0
    # the context of 128 cuts some prompts, for both alike
    tasks = ["--tasks", "piqa,arc_easy", "--task-data", data_dir]
    arguments = ["--text", tiny_text, "--context", 64, "--windows", 2, "--limit", 12]
    code, stdout, _ = cli("eval", small, *tasks, *arguments, "--json", out)
    assert code == 0
    assert "perplexity" in stdout and "average of 2 tasks" in stdout
    data = json.loads(out.read_text())
    assert data["windows"] == 2 and data["perplexity"] > 1
    assert data["task_limit"] == data["tasks"]["piqa"]["items"] == 12
    assert "lm_eval" in data["versions"]
    model, _ = load(small, dtype=torch.float32)
    direct = evaluate_tasks(
        model, tiny_tokenizer, ["piqa", "arc_easy"], data_dir=data_dir, limit=12
    )
    assert direct.to_dict()["task_average"] == data["task_average"]
    # the same weights multiplied out give the same scores
    assert (
        cli("export", "--dense", small, "--out", tmp_path / "dense", "--dtype", "float32")[0] == 0
    )
    code, stdout, _ = cli("eval", tmp_path / "dense", *tasks, "--limit", 12, "--json", "-")
    assert code == 0
    exported = json.loads(stdout)
    assert "perplexity" not in exported
    for name, result in direct.tasks.items():
        assert exported["tasks"][name]["item_scores"] == list(result.item_scores)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "give --text, --tasks, or both"),
        (["--text", "builtin", "--limit", 3], "--limit belong to --tasks"),
        (["--tasks", "piqa,"], "separated by commas"),
        (["--tasks", "piqa", "--task-data", "no/such"], "is not a folder"),
    ],
)
def test_command_errors_are_one_line_before_any_model_is_opened(arguments, match, cli):
    code, _, stderr = cli("eval", "no-such-model", *arguments)
    assert code == 2
    assert match in stderr and stderr.count("\n") == 1


def test_import_is_light():
    program = (
        "import sys, cospadi.cli.app, cospadi.evaluation.tasks; "
        "print([m for m in ('lm_eval', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
