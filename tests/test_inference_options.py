"""Options of generate.py and predict.py, called in this process on one tiny model."""

import io
import json
import shutil
import sys
import threading
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from slide_reports import Prompt
from tests.test_inference import save_model
from tests.tiny_models import REPORTS
from vlm_settings import LATER_PROMPT_PARTS, PROMPT_PARTS

SHORT = ["--num_beams", 2, "--max_new_tokens", 6]


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    from tests.tiny_models import PATCH_WIDTH

    return save_model(tmp_path_factory.mktemp("model") / "final_model", corpus, patch_width=PATCH_WIDTH)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a command of inference in this process: exit status, stdout and stderr."""

    def run(command, *flags, stdin=""):
        module = __import__(f"inference.{command}", fromlist=["main"])
        monkeypatch.setattr(sys, "argv", [f"inference/{command}.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = module.main()
        said = capsys.readouterr()
        return SimpleNamespace(status=status, stdout=said.out, stderr=said.err)

    return run


@pytest.fixture
def features(corpus):
    return sorted(corpus.features.glob("*.h5"))[0]


def write(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_several_questions_are_answered_as_one_by_one(run_here, model, features):
    flags = ["--model", model, "--features", features, *SHORT]
    asked = ["Which organ?", "Is it malignant?"]
    both = run_here("generate", *flags, "--question", *asked).stdout
    alone = [run_here("generate", *flags, "--question", question).stdout for question in asked]
    assert both == f"# {asked[0]}\n{alone[0]}\n# {asked[1]}\n{alone[1]}"
    a_flag_each = [word for question in asked for word in ("--question", question)]
    assert run_here("generate", *flags, *a_flag_each).stdout == both


MANY = ["--num_beams", 8, "--num_return", 8]


def test_json_has_probabilities_of_tokens_and_the_best_answers(run_here, model, features):
    done = run_here("generate", "--model", model, "--features", features, *SHORT, "--json", *MANY)
    found = json.loads(done.stdout)
    texts, scores = ([answer[name] for answer in found["n_best"]] for name in ("report", "beam_score"))
    assert texts[0] == found["report"] and 2 <= len(texts) == len(set(texts)) <= 8, "beams that spell alike are one"
    assert scores == sorted(scores, reverse=True)
    probabilities = [probability for _, probability in found["tokens"]]
    assert len(probabilities) == found["num_tokens"] and all(0 < p <= 1 for p in probabilities)
    assert found["min_token_probability"] <= found["mean_token_probability"]


def test_chat_forgets_when_the_model_reads_no_further(run_here, monkeypatch, model, features):
    from inference import chat

    flags = ["--model", model, "--features", features, "--chat", *SHORT]
    first, second = (run_here("generate", *flags, stdin=f"{asked}\n").stdout for asked in ("Which organ?", "Grade?"))
    monkeypatch.setattr(chat, "room_for_text", lambda vlm: 9)
    talk = run_here("generate", *flags, stdin="Which organ?\nGrade?\nGrade?\n")
    assert talk.stdout == first + 2 * second and talk.stderr.count("is forgotten") == 2


def test_chat_remembers_what_was_said(run_here, model, features):
    flags = ["--model", model, "--features", features, "--chat", *SHORT]
    talk = run_here("generate", *flags, stdin="Which organ?\nWhich grade?\n\nnever asked\n")
    first, second = talk.stdout.splitlines()
    assert run_here("generate", *flags, "--question", "Which organ?", stdin="Which grade?\n").stdout == talk.stdout
    assert run_here("generate", *flags, stdin="Which organ?\n").stdout == first + "\n"
    assert run_here("generate", *flags, stdin="Which grade?\n").stdout != second + "\n"

    # The second answer is that to the whole conversation read anew.
    from inference.answers import make_sample, read_inputs
    from inference.decoding import Decoding, decode_samples, text_of
    from slide_reports import Prompt
    from vlm_loading import load_vlm

    vlm, tokenizer = load_vlm(model)
    prompt = Prompt(**vlm.settings.prompt)
    sample = make_sample(vlm, tokenizer, "Which organ?", read_inputs(vlm, [features]), 1)
    decoding = Decoding(num_beams=2, max_new_tokens=6)
    ((answer,),) = decode_samples(vlm, tokenizer, [sample], decoding=decoding)
    ending = tokenizer(prompt.after_answer, add_special_tokens=False)["input_ids"]
    more = [*answer.token_ids, *ending, *prompt.next_question_ids(tokenizer, "Which grade?", 128)]
    sample |= {"input_ids": sample["input_ids"] + more, "labels": sample["labels"] + [-100] * len(more)}
    ((answer,),) = decode_samples(vlm, tokenizer, [sample], decoding=decoding)
    assert text_of(tokenizer, answer) == second


def test_allowed_reports_and_snapping(run_here, corpus, model, features):
    flags = ["--model", model, "--features", features, "--num_beams", 2]
    limited = run_here("generate", *flags, "--max_new_tokens", 80, "--allowed_reports", corpus.reports)
    assert limited.stdout.strip("\n") in REPORTS
    snapped = run_here("generate", *flags, "--max_new_tokens", 6, "--snap_to", corpus.reports, "--json")
    found = json.loads(snapped.stdout)
    assert found["report"] in REPORTS and found["generated"] not in REPORTS and 0 <= found["similarity"] < 1
    with pytest.raises(ValueError, match="not both"):
        run_here("generate", *flags, "--allowed_reports", corpus.reports, "--grammar", corpus.reports)


@pytest.mark.parametrize(
    "flag, name, content, reason",
    [
        ("--grammar", "g.lark", None, "no such file$"),
        ("--grammar", "g.lark", "start: (", ".*Expected token"),
        ("--grammar", "g.txt", "(a", ".*unclosed group"),
        ("--grammar", "g.txt", "", "is empty"),
        ("--grammar", "g.txt", "\udcff", "is not UTF-8"),
        ("--allowed_reports", "r.json", None, "no such annotation file$"),
        ("--allowed_reports", "r.json", "{", ".*not valid JSON"),
        ("--snap_to", "r.json", None, "no such annotation file$"),
        ("--snap_to", "r.json", '[{"id": "a"}]', "holds no texts"),
    ],
)
def test_what_answers_may_be_is_refused_before_anything_is_loaded(
    run_here, monkeypatch, corpus, model, features, tmp_path, flag, name, content, reason
):
    if flag == "--grammar" and content is not None:
        pytest.importorskip("llguidance")
    monkeypatch.setattr("inference.loading.load_vlm", None)
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content.encode(errors="surrogateescape"))
    records = ["--test_json", corpus.reports, "--features_dir", corpus.features]
    judged = [*records, "--lesions_dir", tmp_path, "--output_dir", tmp_path / "judged"]
    for command, more in (
        ("generate", ["--features", features]),
        ("predict", [*records, "--output", tmp_path / "p.json"]),
        ("judge_evidence", judged),
    ):
        with pytest.raises((ValueError, OSError), match=f"^{flag} {file}: {reason}"):
            run_here(command, "--model", model, *more, flag, file)
    assert not (tmp_path / "p.json.progress").exists()


def test_json_of_a_schema_comes_whole_and_an_answer_that_was_cut_off_is_marked(run_here, model, features, tmp_path):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"grade": {"enum": [1, 2]}}, "required": ["grade"]}
    grammar = write(tmp_path / "g.json", schema | {"additionalProperties": False})
    flags = ["--model", model, "--features", features, "--grammar", grammar, "--num_beams", 2]
    whole = run_here("generate", *flags, "--max_new_tokens", 40)  # a random model would put blanks for ever
    assert json.loads(whole.stdout)["grade"] in (1, 2) and "cut off" not in whole.stderr
    cut = run_here("generate", *flags, "--max_new_tokens", 2)
    assert "cut off after 2 tokens; more with --max_new_tokens" in cut.stderr
    assert json.loads(run_here("generate", *flags, "--max_new_tokens", 2, "--json").stdout)["cut_off"] is True


def test_decoding_is_inherited_from_vlm_json_and_flags_override(run_here, corpus, tmp_path, features):
    from tests.tiny_models import PATCH_WIDTH

    folder = save_model(tmp_path / "final_model", corpus, patch_width=PATCH_WIDTH)
    records = write(tmp_path / "t.json", json.loads(corpus.reports.read_text())[:3])
    predict = ["--model", folder, "--test_json", records, "--features_dir", corpus.features]
    run_here("predict", *predict, "--output", tmp_path / "p.json", *SHORT, "--save_decoding", "--details")
    saved = json.loads((folder / "vlm.json").read_text())["decoding"]
    assert saved == {"num_beams": 2, "max_new_tokens": 6, "length_penalty": 1.0}
    again = run_here("predict", *predict, "--output", tmp_path / "p.json", "--details")
    assert "answered before" in again.stderr
    inherited = run_here("generate", "--model", folder, "--features", features, "--json")
    rows = json.loads((tmp_path / "p.json").read_text())
    assert json.loads(inherited.stdout)["report"] == rows[0]["report"]
    longer = run_here("generate", "--model", folder, "--features", features, "--max_new_tokens", 12, "--json")
    assert json.loads(longer.stdout)["num_tokens"] > 6

    # A threshold between the confidences of two of its answers marks one of them.
    low, high = sorted(row["mean_token_probability"] for row in rows)[:2]
    settings = json.loads((folder / "vlm.json").read_text())
    threshold = {"measure": "mean_token_probability", "threshold": (low + high) / 2, "decoding": {"num_beams": 2}}
    write(folder / "vlm.json", settings | {"decoding": saved | {"uncertain": threshold}})
    done = run_here("predict", *predict, "--output", tmp_path / "q.json", "--details")
    assert [row["uncertain"] for row in json.loads((tmp_path / "q.json").read_text())].count(True) == 1
    assert "uncertain: 1 of 3 records" in done.stderr
    done = run_here("predict", *predict, "--output", tmp_path / "r.json", "--num_beams", 1)
    assert "choose it anew" in done.stderr


def test_questions_about_one_case_share_it_and_make_a_reg_2026_chain(run_here, monkeypatch, corpus, model, tmp_path):
    ids = [record["id"] for record in json.loads(corpus.reports.read_text())[:3]]
    chain = [{"question": "What is the organ?"}, {"question": "Which grade?"}, {"question": "The report?"}]
    records = write(tmp_path / "t.json", [{"id": name, "chain-of-thought": chain} for name in ids])
    flags = ["--model", model, "--test_json", records, "--features_dir", corpus.features, *SHORT, "--batch_size", 2]
    from inference import case_batches

    read = []
    original = case_batches.read_inputs
    monkeypatch.setattr(case_batches, "read_inputs", lambda vlm, paths: read.append(paths) or original(vlm, paths))
    done = run_here("predict", *flags, "--output", tmp_path / "p.json", "--format", "reg2026")
    assert len(read) == 3 and "cases/s" in done.stderr and "tokens/s" in done.stderr
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [row["id"] for row in rows] == ids
    steps = rows[0]["chain-of-thought"]
    assert [step["question"] for step in steps] == [step["question"] for step in chain]
    assert [step["next_question"] for step in steps] == ["Which grade?", "The report?", ""]
    plain = run_here("predict", *flags, "--output", tmp_path / "q.json", "--batch_size", 1)
    answers = [step["answer"] for row in rows for step in row["chain-of-thought"]]
    assert [row["report"] for row in json.loads((tmp_path / "q.json").read_text())] == answers
    assert plain.status == 0
    with pytest.raises(ValueError, match="comes twice"):
        run_here("predict", *flags, "--output", tmp_path / "r.json", "--format", "reg2025")


def test_a_batch_that_fails_is_tried_in_halves_and_costs_only_its_worst(run_here, monkeypatch, corpus, model, tmp_path):
    import torch

    from inference import answers

    records = json.loads(corpus.reports.read_text())[:5]
    flags = ["--model", model, "--test_json", write(tmp_path / "t.json", records), "--features_dir", corpus.features]
    run_here("predict", *flags, *SHORT, "--output", tmp_path / "all.json")
    expected = json.loads((tmp_path / "all.json").read_text())
    decode, tried = answers.decode_samples, []

    def decode_few(vlm, tokenizer, samples, numbers, **more):
        tried.append(list(numbers))
        if 3 in numbers:
            raise RuntimeError("this one\nalways fails")
        if len(samples) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return decode(vlm, tokenizer, samples, numbers=numbers, **more)

    monkeypatch.setattr(answers, "decode_samples", decode_few)
    done = run_here("predict", *flags, *SHORT, "--batch_size", 5, "--output", tmp_path / "p.json")
    assert done.status == 1 and tried == [[0, 1, 2, 3, 4], [0, 1], [2, 3, 4], [2], [3, 4], [3], [4]]
    assert f"failed: {records[3]['id']}: RuntimeError: this one always fails\n" in done.stderr
    assert json.loads((tmp_path / "p.json").read_text()) == [row for n, row in enumerate(expected) if n != 3]
    monkeypatch.undo()
    assert run_here("predict", *flags, *SHORT, "--output", tmp_path / "p.json").status == 0
    assert json.loads((tmp_path / "p.json").read_text()) == expected


OUT_OF_MEMORY = [
    ("torch", "OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
    ("builtins", "RuntimeError", "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    ("builtins", "MemoryError", ""),
]


def run_short_of_memory(monkeypatch, error, most_rows):
    """Let linear layers on a CPU fail at more than so many rows."""
    from inference import cpu_products

    module, name, said = error
    linear = cpu_products.linear

    def fail(rows, *more):
        if len(rows) > most_rows:
            raise getattr(__import__(module), name)(said)
        return linear(rows, *more)

    monkeypatch.setattr(cpu_products, "linear", fail)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=[name for _, name, _ in OUT_OF_MEMORY])
def test_want_of_memory_is_told_in_a_line_with_a_mend(run_here, monkeypatch, model, features, error):
    run_short_of_memory(monkeypatch, error, most_rows=1)  # reads the case, but has no room for two beams
    flags = ["--model", model, "--features", features, *SHORT]
    for more, stdin in ((["--chat"], "Which organ?\n"), ([], "")):
        with pytest.raises(ValueError, match=r"^out of memory.*fewer --num_beams than 2,.*--load_in nf4") as refused:
            run_here("generate", *flags, *more, stdin=stdin)
        assert "\n" not in str(refused.value) and "GPU 0" not in str(refused.value)


def test_a_model_too_large_is_told_in_a_line_with_a_mend(run_here, monkeypatch, model, features):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("inference.loading.load_vlm", fail)
    with pytest.raises(ValueError, match="^out of memory; load the model lighter, with --load_in nf4"):
        run_here("generate", "--model", model, "--features", features)


def test_other_errors_of_a_forward_pass_are_not_called_want_of_memory(run_here, monkeypatch, model, features):
    run_short_of_memory(monkeypatch, ("builtins", "RuntimeError", "shapes do not match"), most_rows=1)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_here("generate", "--model", model, "--features", features, *SHORT)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=[name for _, name, _ in OUT_OF_MEMORY])
def test_want_of_memory_in_a_batch_halves_it_or_costs_its_records_only(
    run_here, monkeypatch, corpus, model, tmp_path, error
):
    records = json.loads(corpus.reports.read_text())[:3]
    flags = ["--model", model, "--test_json", write(tmp_path / "t.json", records), "--features_dir", corpus.features]
    run_here("predict", *flags, *SHORT, "--output", tmp_path / "all.json")
    run_short_of_memory(monkeypatch, error, most_rows=2)  # the beams of one record
    assert run_here("predict", *flags, *SHORT, "--output", tmp_path / "p.json").status == 0
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads((tmp_path / "all.json").read_text())
    run_short_of_memory(monkeypatch, error, most_rows=0)
    done = run_here("predict", *flags, *SHORT, "--output", tmp_path / "none.json")
    assert done.status == 1 and done.stderr.count("fewer --num_beams than 2") == 3


def test_of_beams_that_spell_one_text_the_best_is_listed(model):
    from inference.answers import Answering
    from inference.decoding import Decoded, Decoding
    from tests.tiny_models import make_tokenizer

    tokenizer = make_tokenizer()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a b", "c", "a b ")]
    found = [Decoded(tokens, -score, (-score,)) for tokens, score in zip(ids, (1.0, 2.0, 3.0), strict=True)]
    beams = Answering(Decoding(num_beams=3, num_return=3)).describe(tokenizer, found)
    assert [(one["report"], one["beam_score"]) for one in beams["n_best"]] == [("a b", -1), ("c", -2)]
    draws = Answering(Decoding(num_beams=1, do_sample=True, num_return=3)).describe(tokenizer, found)
    assert len(draws["n_best"]) == 3


def test_slides_are_encoded_while_others_are_decoded(run_here, monkeypatch, corpus, tmp_path):
    from inference import predict
    from inference.new_slides import SlideReader
    from slide_reports import describe_features
    from stage0_tiling import encoding
    from tests.slides import DrawnSlide

    slides = tmp_path / "slides"
    for name in "abc":
        DrawnSlide().write(slides / f"{name}.tiff")
    (slides / "torn.svs").write_bytes(b"not a slide")
    with pytest.MonkeyPatch.context() as patched:
        tiles = ["--tile_size", 64, "--mpp", 1, "--min_tissue", 0.3, "--encoder", corpus.encoder]
        flags = ["--slides", slides / "a.tiff", "--output_dir", tmp_path / "out", *tiles]
        patched.setattr(sys, "argv", ["encode.py", *map(str, flags)])
        from stage0_tiling import encode

        assert encode.main() == 0
    folder = save_model(tmp_path / "final_model", corpus, **describe_features(tmp_path / "out" / "features" / "a.h5"))
    from_features = run_here("generate", "--model", folder, "--features", tmp_path / "out/features/a.h5", *SHORT)

    # Each decoding waits until the next slide is being encoded: one after the other would wait for ever.
    began = {number: threading.Event() for number in range(5)}
    reading, answer, count = SlideReader.read, predict.answer_batch, {"read": 0, "answered": 0}

    def read(*args, **kwargs):
        began[count["read"]].set()
        count["read"] += 1
        return reading(*args, **kwargs)

    def answer_batch(*args):
        count["answered"] += 1
        if count["answered"] < 4:
            assert began[count["answered"]].wait(60)
        return answer(*args)

    monkeypatch.setattr(SlideReader, "read", read)
    monkeypatch.setattr(predict, "answer_batch", answer_batch)
    predict_flags = ["--model", folder, "--slides", slides, *SHORT, "--batch_size", 1]
    done = run_here("predict", *predict_flags, "--output", tmp_path / "p.json")
    rows = json.loads((tmp_path / "p.json").read_text())
    assert done.status == 1 and "failed: torn.svs" in done.stderr
    assert [row["id"] for row in rows] == ["a.tiff", "b.tiff", "c.tiff"]
    assert rows[0]["report"] == from_features.stdout.strip("\n")

    # A slide that failed may be mended and only it is read; one that was answered may not be another now.
    monkeypatch.setattr(predict, "answer_batch", answer)
    again = []
    monkeypatch.setattr(
        SlideReader, "read", lambda self, paths, *more: again.append(paths) or reading(self, paths, *more)
    )
    shutil.copy(slides / "b.tiff", slides / "torn.svs")
    assert run_here("predict", *predict_flags, "--output", tmp_path / "p.json").status == 0
    mended = json.loads((tmp_path / "p.json").read_text())
    assert len(again) == 1 and mended[:3] == rows and mended[3] == {"id": "torn.svs", "report": rows[1]["report"]}
    (slides / "torn.svs").unlink()
    with pytest.raises(ValueError, match=r"is of other work \(.*torn.svs is not among them now\)"):
        run_here("predict", *predict_flags, "--output", tmp_path / "p.json")
    (slides / "a.tiff").touch()
    with pytest.raises(ValueError, match=r"is of other work \(--num_beams was 2, .*a.tiff has changed, .*\)"):
        run_here("predict", *predict_flags, "--num_beams", 1, "--output", tmp_path / "p.json")

    # A record of several slides is one case, each slide with what the list says of it.
    monkeypatch.setattr(SlideReader, "read", reading)
    listed = tmp_path / "slides.csv"
    listed.write_text(f"path,mpp\n{slides / 'a.tiff'},\n{slides / 'b.tiff'},1.0\n")
    records = write(tmp_path / "t.json", [{"id": "a.tiff", "report": "", "slides": ["a.tiff", "b"]}])
    sizes, encode_slide = [], encoding.encode_slide
    monkeypatch.setattr(
        encoding,
        "encode_slide",
        lambda path, *a, **more: sizes.append(more.get("slide_mpp")) or encode_slide(path, *a, **more),
    )
    flags = ["--model", folder, "--test_json", records, *SHORT, "--output", tmp_path / "case.json"]
    assert run_here("predict", "--slides", listed, *flags).status == 0
    assert sizes == [None, 1.0]
    both = run_here("generate", "--model", folder, "--slide", slides / "a.tiff", slides / "a.tiff", *SHORT).stdout
    alone = json.loads((tmp_path / "case.json").read_text())[0]["report"]
    assert run_here("predict", "--slides", slides, *flags, "--overwrite").status == 0
    assert json.loads((tmp_path / "case.json").read_text())[0]["report"] == both.strip("\n") != ""
    assert alone
    with pytest.raises(ValueError, match="b is not among --slides"):
        run_here("predict", "--slides", slides / "a.tiff", *flags, "--overwrite")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_model_answers_with_quantised_layers(run_here, model, features, kind):
    pytest.importorskip("bitsandbytes")
    import torch

    flags = ["--model", model, "--features", features, *SHORT]
    assert run_here("generate", *flags, "--load_in", kind).status == 0
    from inference.quantized import quantize_llm
    from vlm_loading import load_vlm

    whole, _ = load_vlm(model)
    small, _ = load_vlm(model)
    quantize_llm(small.llm, kind, "cpu")
    names = {type(module).__name__ for module in small.llm.modules()}
    assert {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[kind] in names
    assert type(small.llm.lm_head).__name__ == "Linear"
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        plain, rough = (vlm.llm(input_ids=ids).logits.flatten() for vlm in (whole, small))
    similarity = torch.cosine_similarity(plain, rough, dim=0)
    assert (0.99 if kind == "int8" else 0.8) < similarity < 1


def test_feed_forward_blocks_are_compiled_on_request(run_here, monkeypatch, model, features):
    import torch

    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **kwargs: compiled.append(type(module).__name__))
    run_here("generate", "--model", model, "--features", features, *SHORT, "--compile")
    assert compiled == ["Gemma3nTextMLP"] * 4


def test_linear_layers_on_a_cpu_compute_by_onednn(model):
    import torch

    from inference.loading import open_model

    args = SimpleNamespace(model=str(model), device="cpu", dtype=None, llm_name=None, vision_model_name=None)
    vlm, _ = open_model(args)
    layers = [layer for layer in vlm.llm.modules() if type(layer) is torch.nn.Linear]
    assert layers and all(layer.forward.__func__.__module__ == "inference.cpu_products" for layer in layers)


def test_a_hub_model_without_network_is_told_what_folder_would_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    from inference.loading import model_folder

    def fail(*args, **kwargs):
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConnectionError, match=r"^the weights of model org/name are not .*that holds vlm\.json$"):
        model_folder("org/name")


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--temperature", 0.5], "add --do_sample"),
        (["--top_p", 0.9], "add --do_sample"),
        (["--chat", "--json"], "leave out --json"),
        (["--chat", "--num_return", 2], "leave out --json"),
        (["--max_new_tokens", 100_000], "reads 512 tokens"),
    ],
)
def test_flags_that_would_do_nothing_or_never_end_are_refused(run_here, model, features, flags, reason):
    with pytest.raises(ValueError, match=reason):
        run_here("generate", "--model", model, "--features", features, *flags)


def test_the_parts_of_a_prompt_are_known_to_the_settings():
    required = {part.name for part in fields(Prompt) if part.default is MISSING}
    assert required == PROMPT_PARTS
    assert {part.name for part in fields(Prompt)} - required == LATER_PROMPT_PARTS


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"patch_width": "12"}, "patch_width is '12', where int belongs"),
        ({"tiling": None}, "tiling is None, where dict belongs"),
        ({"output_rms": True}, "output_rms is True, where float belongs"),
        ({"llm_four_bit": 4}, "llm_four_bit is 4, where dict or null belongs"),
        ({"prompt": {"before": ""}}, "prompt: .*'before'"),
        ({"decoding": [1]}, "decoding is .1., where dict belongs"),
        ({"decoding": {"num_beams": "3"}}, "num_beams is '3', where a whole number above 0 belongs"),
        ({"decoding": {"max_new_tokens": 0}}, "max_new_tokens is 0, where a whole number above 0 belongs"),
        ({"placeholder_id": 328}, "placeholder_id is 328, where an id of .*vocabulary of 328 belongs"),
        ({"placeholder_id": -1}, "placeholder_id is -1, where an id of"),
        ({"decoding": {"length_penalty": None}}, "length_penalty is None, where a number belongs"),
    ],
)
def test_a_wrong_value_in_vlm_json_is_named(run_here, model, features, tmp_path, change, reason):
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "vlm.json"
    write(file, json.loads(file.read_text()) | change)
    with pytest.raises(ValueError, match=f"vlm.json: .*{reason}"):
        run_here("generate", "--model", tmp_path / "model", "--features", features)


def test_an_adapter_that_is_no_more_whole_is_named(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.tiny_models import make_llm
    from vlm_loading import open_adapter

    folder = tmp_path / "adapter"
    get_peft_model(make_llm("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{folder}: no adapter that fits .*copy the folder"):
        open_adapter(make_llm("llama"), folder)
    weights.write_bytes(whole)
    for wrong in ({}, settings | {"r": 3}):
        write(config, wrong)
        with pytest.raises(ValueError, match=f"{folder}: no adapter that fits"):
            open_adapter(make_llm("llama"), folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors: not found"):
        open_adapter(make_llm("llama"), folder)


def test_a_folder_that_is_not_there_is_called_so(tmp_path):
    from language_model import load_llm, load_tokenizer

    for opened in (load_llm, load_tokenizer):
        with pytest.raises(ValueError, match=r"\(no such folder\); give a folder or hub name"):
            opened(str(tmp_path / "moved"))


def test_a_message_does_not_quote_a_whole_file(run_here, tmp_path, capsys):
    file = write(tmp_path / "no_flags.yaml", ["a report"] * 10_000)
    with pytest.raises(SystemExit):
        run_here("generate", "--config", file)
    message = capsys.readouterr().err
    assert message.startswith("error: Unexpected config: ") and len(message) < 1100


def test_predictions_never_take_the_place_of_other_files(run_here, corpus, model, tmp_path):
    records = write(tmp_path / "test.json", json.loads(corpus.reports.read_text())[:1])
    other = write(tmp_path / "other.json", [1])
    flags = ["--model", model, "--test_json", records, "--features_dir", corpus.features, *SHORT, "--output"]
    before = records.read_bytes()
    for output, more, reason in (
        (records, ["--overwrite"], "is the file given as test_json"),
        (tmp_path, [], "is a folder"),
        (other, [], "is not of predict.py"),
    ):
        with pytest.raises(ValueError, match=reason):
            run_here("predict", *flags, output, *more)
    assert records.read_bytes() == before and other.read_text() == "[1]"
    assert run_here("predict", *flags, other, "--overwrite").status == 0
    assert "answered before" in run_here("predict", *flags, other).stderr


@pytest.fixture
def room(monkeypatch):
    """Let language models have so many positions."""
    return lambda positions: monkeypatch.setattr("inference.room.room_for_text", lambda vlm: positions)


def test_answers_end_where_the_language_model_reads_no_further(run_here, room, corpus, model, features, tmp_path):
    flags = ["--model", model, "--features", features, "--num_beams", 2, "--question", "Which organ?", "--json"]
    whole = json.loads(run_here("generate", *flags, "--max_new_tokens", 9).stdout)
    assert whole["num_tokens"] == 9
    short = json.loads(run_here("generate", *flags, "--max_new_tokens", 5).stdout)
    from inference.answers import make_sample, read_inputs
    from inference.prefixes import read_prefixes
    from vlm_loading import load_vlm

    vlm, tokenizer = load_vlm(model)
    sample = make_sample(vlm, tokenizer, "Which organ?", read_inputs(vlm, [features]), 1)
    (prefix,) = read_prefixes(vlm, [sample])
    length = len(prefix) + len(sample["input_ids"]) - sample["input_ids"].index(-200) - 1
    room(length + 5)
    limited = json.loads(run_here("generate", *flags, "--max_new_tokens", 9).stdout)
    assert limited["tokens"] == short["tokens"] and limited["cut_off"]
    said = run_here("generate", *flags[:-1], "--max_new_tokens", 9).stderr
    assert said.endswith("cut off after 5 tokens: with the prompt, the language model reads no more\n")
    room(length)
    with pytest.raises(ValueError, match=rf"^the prompt takes {length} tokens.* reads {length} with the answer; ask"):
        run_here("generate", *flags)
    room(len(prefix))
    with pytest.raises(ValueError, match=rf"^the prompt takes {len(prefix)} tokens"):
        run_here("generate", *flags)

    # In a batch, and with the longest answer as vlm.json says it: each as by itself, those without room listed.
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "vlm.json"
    write(file, json.loads(file.read_text()) | {"decoding": {"max_new_tokens": 10_000, "num_beams": 1}})
    rows = [{"id": json.loads(corpus.reports.read_text())[0]["id"], "question": "organ " * n} for n in (1, 2, 3, 30)]
    chains = [{"id": rows[0]["id"], "chain-of-thought": [{"question": row["question"]} for row in rows]}]
    records = write(tmp_path / "t.json", chains)
    flags = ["--model", tmp_path / "model", "--test_json", records, "--features_dir", corpus.features]
    room(length + 20)
    together = run_here("predict", *flags, "--output", tmp_path / "p.json", "--details")
    assert together.status == 1 and together.stderr.count("failed: ") == together.stderr.count("the prompt takes ") == 1
    run_here("predict", *flags, "--output", tmp_path / "q.json", "--details", "--batch_size", 1)
    answers = [json.loads((tmp_path / name).read_text()) for name in ("p.json", "q.json")]
    for one, other in zip(*answers, strict=True):
        assert [one[key] for key in ("question", "report")] == [other[key] for key in ("question", "report")]
    cut = sum(one.get("cut_off", False) for one in answers[0])
    assert len(answers[0]) == 3 and cut and f"cut off: {cut} of 3 records" in together.stderr


def test_chat_tells_of_a_question_that_is_cut_and_an_answer_that_is(run_here, model, features):
    flags = ["--model", model, "--features", features, "--chat", "--num_beams", 1, "--max_new_tokens", 3]
    talk = run_here("generate", *flags, stdin=f"Which organ?\n{'organ ' * 300}\n")
    assert len(talk.stdout.splitlines()) == 2
    told = [line for line in talk.stderr.splitlines() if "cut" in line]
    assert told[0] == told[2] == "cut off after 3 tokens; more with --max_new_tokens"
    assert "a question is cut: the model reads 128 tokens of one, not its last " in told[1] and len(told) == 3


def test_answers_of_another_dtype_are_not_continued(run_here, monkeypatch, corpus, tmp_path):
    """On a machine whose default dtype is another, or by a version that did not note it."""
    import torch

    from tests.tiny_models import PATCH_WIDTH, make_llm

    base = save_model(tmp_path / "final_model", corpus, patch_width=PATCH_WIDTH)
    make_llm().to(torch.bfloat16).save_pretrained(base / "language_model")
    records = json.loads(corpus.reports.read_text())[:1]
    flags = ["--model", base, "--features_dir", corpus.features, "--output", tmp_path / "p.json", "--device", "cpu"]
    flags += ["--max_new_tokens", 2, "--test_json", write(tmp_path / "t.json", [*records, {"id": "missing.tiff"}])]

    def predict(*more, able):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
        return run_here("predict", *flags, *more)

    first = predict(able=True)
    assert first.status == 1 and "language model in bf16, on cpu\n" in first.stderr
    with pytest.raises(ValueError, match="language model in bf16, not fp32; go on with --dtype bf16, or add --over"):
        predict(able=False)
    assert predict("--dtype", "bf16", able=False).status == 1
    kept = tmp_path / "p.json.progress" / "settings.json"
    write(kept, json.loads(kept.read_text()) | {"dtype": None})
    with pytest.raises(ValueError, match="language model in fp32, not bf16"):
        predict(able=True)
    assert predict("--overwrite", able=False).status == 1
    write(tmp_path / "t.json", records)
    assert predict("--overwrite", able=False).status == 0
    assert json.loads((tmp_path / "p.json.run.json").read_text())["dtype"] == "fp32"
    assert "answered before" in predict(able=True).stderr


def test_predict_counts_questions_that_are_cut(model, capsys):
    from inference.predict import tell_unread_questions
    from tests.tiny_models import make_tokenizer
    from vlm_settings import VLMSettings

    asked = ["", "Which organ?", "organ " * 300, "organ " * 300]
    records = [SimpleNamespace(question=question) for question in asked]
    tell_unread_questions(records, VLMSettings.read(model), make_tokenizer())
    assert capsys.readouterr().err == "2 of 4 questions are cut: the model reads 128 tokens of one\n"
    settings = VLMSettings.read(model)
    tell_unread_questions(records[:2], settings, make_tokenizer())
    assert not capsys.readouterr().err
    settings.question = "organ " * 300  # of records that ask nothing of their own
    tell_unread_questions(records[:2], settings, make_tokenizer())
    assert capsys.readouterr().err.startswith("1 of 2 questions are cut")
