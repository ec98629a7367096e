# SPDX-License-Identifier: Apache-2.0
"""What `check_loss` hands over: the report in its forms, and the command line."""

import os
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal, Optional, TypedDict
from xml.etree import ElementTree

import pytest
import torch
from pydantic import BaseModel, Field
from rich.console import Console

from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn, NLLLossFn
from nemo_rl_ref.algorithms.loss.interfaces import LossInputType
from nemo_rl_ref.contract import PROMISES, Entry, Failure, Report, check_loss
from nemo_rl_ref.contract.__main__ import main
from nemo_rl_ref.contract._causes import KINDS
from nemo_rl_ref.contract.build import build_loss
from nemo_rl_ref.contract.user_code import UsageError, find

ROOT = Path(__file__).parents[2]

SHOWN = "1 row, 2 tokens\nlogits = [[inf]]"
REPORT = Report(
    "Loss<a & b>",
    (
        Entry("protocol", "attributes", "ok", "loss 1 < 2", seconds=0.25),
        Entry("ranks", "unequal", "not applicable", "the batch has one example"),
        Entry(
            "masks",
            'no "garbage"',
            "failed",
            "huge: [bold]nothing[/bold]",
            (Failure("inf in <logits>\x00", shown=SHOWN), Failure("nan")),
            seconds=1.5,
        ),
    ),
)


def test_report():
    assert not REPORT.ok
    assert REPORT.failed == ("masks",)
    assert REPORT["ranks"].measured == "the batch has one example"
    assert repr(REPORT) == "<Report on Loss<a & b>: broken: masks>"
    assert REPORT.title == "Loss<a & b>: 1 of 2 promises kept"
    with pytest.raises(KeyError, match="name is 'mask', expected one of .*'masks'"):
        REPORT["mask"]
    kept = Report("Loss", REPORT.entries[:2])
    assert kept.ok and repr(kept) == "<Report on Loss: ok>"


def test_table():
    text = str(REPORT)
    lines = text.splitlines()
    assert lines[0].strip() == "Loss<a & b>: 1 of 2 promises kept"
    assert max(map(len, lines)) <= 100
    # The brackets are text and no styles.
    assert "huge: [bold]nothing[/bold]" in text and "logits = [[inf]]" in text
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=80, file=nowhere)
        console.print(REPORT)
    assert "BROKEN: nan" in console.export_text()


def test_the_text_is_there_in_a_notebook_too(monkeypatch):
    """In a notebook rich would display the table instead of returning it."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "NLLLossFn" in str(check_loss(NLLLossFn(), only=["protocol"]))


def test_only_printing_needs_rich():
    """So that a minimal installation can check its losses."""
    code = (
        "import sys, nemo_rl_ref.contract; "
        "print([m for m in ('rich', 'cloudpickle') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


class Cells(HTMLParser):
    """The texts of the cells, and the tags that were opened."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_html_is_escaped():
    cells = Cells(REPORT._repr_html_())
    assert set(cells.tags) <= {
        *("table", "caption", "thead", "tbody", "tr", "th", "td", "span"),
        *("strong", "br", "details", "summary", "pre"),
    }
    assert "Loss<a & b>: 1 of 2 promises kept" in cells.texts
    assert "loss 1 < 2" in cells.texts
    assert SHOWN in cells.texts
    assert cells.tags.count("tr") == 4


def test_junit(tmp_path):
    path = tmp_path / "report.xml"
    REPORT.to_junit(path)
    suite = ElementTree.parse(path).getroot()
    assert suite.attrib == {
        "name": "Loss<a & b>",
        "tests": "3",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
        "time": "1.750",
    }
    first, second, third = suite
    assert [case.get("name") for case in suite] == ["protocol", "ranks", "masks"]
    assert first.find("system-out").text == "loss 1 < 2"
    assert second.find("skipped").get("message") == "the batch has one example"
    # A NUL cannot be in XML.
    assert third.find("failure").get("message") == "inf in <logits>\ufffd; nan"
    assert "logits = [[inf]]" in third.find("failure").text
    assert list(tmp_path.iterdir()) == [path]
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o644


def test_junit_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "report.xml"
    path.write_text("old", encoding="utf-8")

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        REPORT.to_junit(path)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        REPORT.to_junit(tmp_path / "no" / "report.xml")


def test_a_real_report_in_all_forms(tmp_path):
    report = check_loss(NLLLossFn(), only=["masks", "protocol"])
    assert [entry.name for entry in report.entries] == ["protocol", "masks"]
    for text in (str(report), " ".join(Cells(report._repr_html_()).texts)):
        assert "next_token_logprobs = [[nan]]" in text
    report.to_junit(tmp_path / "a.xml")
    assert ElementTree.parse(tmp_path / "a.xml").getroot().get("failures") == "1"


# The command line.


class StrictConfig(BaseModel, extra="forbid"):
    rate: float
    limit: Optional[float] = 1.0
    kind: Literal["a", "b"] = "a"
    weights: list[float] = []
    steps: int = Field(1, gt=0)


class Strict(NLLLossFn):
    def __init__(self, cfg: StrictConfig, fused: bool = False):
        super().__init__(fused)
        self.cfg = cfg


class NamedLossConfig(BaseModel):
    alpha: float = 0.5


class NamedLossFn(NLLLossFn):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg


class TypedConfig(TypedDict):
    scale: float


class Typed(NLLLossFn):
    def __init__(self, cfg: TypedConfig):
        super().__init__()
        self.cfg = cfg


class ReadsMore(DPOLossFn):
    """Reads a key that its config does not declare."""

    def __init__(self, cfg: DPOLossConfig):
        super().__init__(cfg)
        self.cfg = cfg
        self.sharpness = getattr(cfg, "sharpness", 1)


class Unannotatable(NLLLossFn):
    def __init__(self, cfg: "OnlyForTypeCheckers" = None):  # noqa: F821  # pyright: ignore
        super().__init__()
        self.cfg = cfg


def test_a_config_without_annotation_is_that_of_the_base_class():
    class Unannotated(DPOLossFn):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.margin = getattr(cfg, "margin", 0.5)

    Unannotated.__module__ = "json"  # whose names are no configurations
    assert build_loss(Unannotated, ["margin=2", "sft_loss_weight=1"]).sft_loss_weight == 1.0
    assert build_loss(Unannotated, ["margin=2"]).margin == 2


def test_config_values_have_their_types():
    loss = build_loss(Strict, ["rate=1e-3", "limit=null", "kind=b", "weights=[1, 2]", "fused=true"])
    assert loss.cfg == StrictConfig(rate=0.001, limit=None, kind="b", weights=[1.0, 2.0])
    assert loss.use_fused_linear_logprobs is True
    assert build_loss(NamedLossFn, ["alpha=2"]).cfg == NamedLossConfig(alpha=2.0)
    assert build_loss(Typed, ["scale=2"]).cfg == {"scale": 2.0}
    assert build_loss(NLLLossFn, []).use_fused_linear_logprobs is False
    assert build_loss(type("Bare", (), {}), []) is not None
    dpo = build_loss(DPOLossFn, ["sft_loss_weight=1", "preference_average_log_probs=yes"])
    assert dpo.sft_loss_weight == 1.0 and dpo.preference_average_log_probs is True


def test_undeclared_keys_must_be_read():
    loss = build_loss(ReadsMore, ["sharpness=3", "sft_loss_weight=0.5"])
    assert loss.sharpness == 3 and loss.sft_loss_weight == 0.5
    assert type(loss.cfg) is DPOLossConfig
    assert build_loss(ReadsMore, ["sharpness=high"]).sharpness == "high"
    with pytest.raises(UsageError, match="no setting 'sharpnes'; did you mean 'sharpness'"):
        build_loss(ReadsMore, ["sharpnes=3"])
    with pytest.raises(UsageError, match="no setting 'sft_loss_wieght'; did you mean 'sft_loss_w"):
        build_loss(DPOLossFn, ["sft_loss_wieght=0.1"])


@pytest.mark.parametrize(
    ("kind", "pairs", "words"),
    [
        (Strict, [], "Strict: ValidationError: .*rate Field required"),
        (Strict, ["rate=fast"], "rate is 'fast', expected float: Input should be a valid number"),
        (Strict, ["rate=1", "kind=c"], "kind is 'c', expected .*Input should be 'a' or 'b'"),
        (Strict, ["rate=1", "steps=0"], "steps is '0', expected .*greater than 0"),
        (Strict, ["rate=1", "rate=2"], "rate is given twice"),
        (Strict, ["rate"], "got 'rate', expected key=value"),
        (Strict, ["rates=1"], "no setting 'rates'; did you mean 'rate'"),
        (NLLLossFn, ["zzz=1"], "no setting 'zzz'; it has use_fused_linear_logprobs"),
        (Unannotatable, ["zzz=1"], "no setting 'zzz'"),
        (NLLLossFn(), [], "is no class, expected a loss class"),
    ],
)
def test_bad_pairs(kind, pairs, words):
    with pytest.raises(UsageError, match=words) as caught:
        build_loss(kind, pairs)
    assert "\n" not in str(caught.value)


def test_find():
    assert find("nemo_rl_ref.algorithms.loss:NLLLossFn") is NLLLossFn
    for path in ("nemo_rl_ref.algorithms.loss", ":NLLLossFn", "x:"):
        with pytest.raises(UsageError, match="expected path/to/file.py:Name or package.module:N"):
            find(path)
    with pytest.raises(UsageError, match="cannot import no_such_module: ModuleNotFoundError"):
        find("no_such_module:Loss")
    with pytest.raises(UsageError, match="has no 'NLLosFn'; did you mean 'NLLLossFn'"):
        find("nemo_rl_ref.algorithms.loss:NLLosFn")


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "half_typed.py").write_text("def broken(:\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="cannot import half_typed: SyntaxError"):
        find("half_typed:Loss")


NLL = "nemo_rl_ref.algorithms.loss:NLLLossFn"


def test_exit_status(capsys, tmp_path):
    assert main([NLL, "--only", "gradient", "use_fused_linear_logprobs=true"]) == 0
    assert "1 of 1 promises kept" in capsys.readouterr().out
    junit = tmp_path / "report.xml"
    # What NeMo RL's own class breaks is said, and no fault of the author's.
    assert main([NLL, "--only=masks", "--only=purity", "--junit", str(junit)]) == 0
    said = capsys.readouterr().out
    assert "As in NeMo RL's NLLLossFn" in said and "1 of 2 promises kept" in said
    assert ElementTree.parse(junit).getroot().get("failures") == "1"


def bad_maker(seed, dtype):
    return {}, {}


def good_maker(seed, dtype):
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -0.1]], dtype=dtype)
    masks = {"token_mask": torch.ones(2, 3), "sample_mask": torch.ones(2)}
    return {"next_token_logprobs": logprobs}, masks


class CrossTokenizer(NLLLossFn):
    input_type = LossInputType.DISTILLATION_CROSS_TOKENIZER


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no loss, expected path/to/my_loss.py:MyLoss or package.module:MyLoss"),
        (["nope"], "got 'nope', expected path/to/file.py:Name or package.module:Name"),
        ([NLL, "--bogus"], "unrecognized arguments: --bogus"),
        ([NLL, "--only", "mask"], "invalid choice: 'mask'"),
        ([NLL, "x=1"], "NLLLossFn has no setting 'x'"),
        ([NLL, "--junit", "no/such/folder/a.xml"], "--junit is 'no/such/folder/a.xml', whose"),
        ([f"{__name__}:CrossTokenizer"], "give a batch_maker"),
        ([NLL, "--batch-maker", f"{__name__}:bad_maker"], "data has no tensor"),
        ([NLL, "--batch-maker", f"{__name__}:nope"], "has no 'nope'"),
    ],
)
def test_usage_errors_are_one_line(argv, words, capsys):
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert words in printed.err


def test_options(capsys):
    maker = ["--batch-maker", f"{__name__}:good_maker"]
    assert main([NLL, "--only", "ranks", *maker]) == 0
    more = ["--preference-pairs", "--details"]
    assert main([NLL, "--only", "micro-batches", *maker, *more]) == 0
    assert "one call a pair" in capsys.readouterr().out.replace("\n", " ")


def test_the_command():
    """The real thing, with all nine promises, from a folder that holds a loss."""
    command = [sys.executable, "-m", "nemo_rl_ref.contract"]
    command += ["nemo_rl_ref.algorithms.loss:DPOLossFn", "reference_policy_kl_penalty=0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # 0 · NaN is NeMo RL's, see test_contract.py
    assert "DPOLossFn: 8 of 9 promises kept" in done.stdout
    assert all(name.split()[0] in done.stdout for name in PROMISES)
    assert done.stderr == ""


# A loss of the user's, from its file.

MEAN = """
import torch
from nemo_rl_ref.algorithms.loss import DPOLossFn, NLLLossFn

class Mean(DPOLossFn):
    def _preference_loss(self, rewards, sample_mask, global_valid_seqs, beta=1.0):
        _, *rest = super()._preference_loss(rewards, sample_mask, global_valid_seqs, beta)
        margins = beta * (rewards[::2] - rewards[1::2])
        return (-torch.nn.functional.logsigmoid(margins).mean(), *rest)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])

    def write_file(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


def test_a_loss_is_named_as_the_trainers_take_it(write, tmp_path, monkeypatch):
    """By its file, relative or not, or by its module."""
    path = write("my_mean.py", MEAN)
    kind = find(f"{path}:Mean")
    monkeypatch.chdir(tmp_path)
    assert find("my_mean.py:Mean") is kind and find("my_mean:Mean") is kind
    assert kind.__module__ == "my_mean"  # so that it can be pickled by reference


def test_own_names_come_before_imported_ones(write):
    path = write("my_names.py", MEAN)
    with pytest.raises(UsageError, match="has no 'Meen'; did you mean 'Mean'"):
        find(f"{path}:Meen")
    with pytest.raises(UsageError, match="has no 'Xyz'; it has Mean$"):
        find(f"{path}:Xyz")
    with pytest.raises(UsageError, match="has no 'DPOLosFn'; did you mean 'DPOLossFn'"):
        find(f"{path}:DPOLosFn")


def test_one_mean_is_one_cause_with_what_to_write_instead(write, capsys):
    """And what NeMo RL's loss lets through is told apart; the measurements are for who asks."""
    path = write("my_cause.py", MEAN)
    line = [f"{path}:Mean", "reference_policy_kl_penalty=0.1"]
    assert main([*line, "--only", "micro-batches", "--only", "ranks", "--only", "masks"]) == 1
    said = capsys.readouterr().out
    assert "1. The losses of the parts of a batch do not add up" in said
    assert "Broken: micro-batches, ranks, masks." in said
    assert "Write instead: sum over what the masks leave, and divide by global_valid_seqs" in said
    assert "loss-functions.md#mean-of-means" in said
    assert "2. As in NeMo RL's DPOLossFn: an infinity or NaN in a masked place" in said
    assert "3. " not in said and len(said.splitlines()) <= 10
    assert main([*line, "--only", "ranks", "--details"]) == 1
    assert "smallest batch: " in capsys.readouterr().out


def test_pages_that_explain_are_there():
    for kind in KINDS:
        page, _, anchor = kind.page.partition("#")
        text = (ROOT / page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        anchors = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in headings}
        assert anchor in anchors | set(re.findall(r"^\(([\w-]+)\)=$", text, re.M))


BAD_CODE = {
    "import sys\nsys.exit(0)\n": "my_bad.py: it calls sys.exit ({file}:2)",
    "def f(:\n": "my_bad.py: SyntaxError: ",
    "x = 1\n1 / 0\n": "my_bad.py: ZeroDivisionError: division by zero ({file}:2)",
    "def Loss(a, b): ...\n": "'Loss' ({file}:1) is no class, expected a loss class",
    "class Loss:\n    def __init__(self):\n        raise OSError('x')\n": "Loss: OSError: x ({file}:3)",
    "class Loss:\n    def __init__(self):\n        exit(0)\n": "Loss: SystemExit: 0 ({file}:3)",
}


@pytest.mark.parametrize("code", BAD_CODE, ids=range(len(BAD_CODE)))
def test_code_that_cannot_be_used_is_one_error_with_its_line(write, capsys, code):
    sys.modules.pop("my_bad", None)
    path = write("my_bad.py", code)
    assert main([f"{path}:Loss"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and BAD_CODE[code].format(file=path) in error


CALL = """
import torch
from nemo_rl_ref.algorithms.loss import NLLLossFn

class Loss(NLLLossFn):
    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        {}
"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("return next_token_logprobs @ next_token_logprobs, {}", "({file}:7)"),
        ("import sys; sys.exit(0)", "a call raises RuntimeError: it calls sys.exit ({file}:7)"),
        (
            "return next_token_logprobs.sum(), {'x': 'text'}",
            "metric 'x' is a str, expected a float",
        ),
        ("return next_token_logprobs.detach().sum(), {}", "the loss has no gradient"),
        ("return next_token_logprobs.sum(-1), {}", "the loss has shape (6,)"),
    ],
)
def test_a_loss_that_does_not_answer_is_one_cause_with_its_line(write, capsys, code, words):
    sys.modules.pop("my_call", None)
    path = write("my_call.py", CALL.replace("{}", code, 1))
    assert main([f"{path}:Loss", "--only", "protocol"]) == 1
    said = capsys.readouterr().out
    assert words.format(file=path) in said.replace("{}", "")
    assert "1. " in said and "2. " not in said


@pytest.mark.parametrize("where", ["import", "call", "caught"])
def test_an_endless_loop_ends_with_its_line(write, capsys, monkeypatch, where):
    """At import, in a call, and where the loss catches every exception."""
    monkeypatch.setattr("nemo_rl_ref.contract.limits.SECONDS", 2.0)
    sys.modules.pop("my_loop", None)
    loop = "while True: pass"
    body = {"call": loop, "caught": f"try:\n            {loop}\n        except Exception: pass"}
    code = loop if where == "import" else CALL.replace("{}", body[where])
    path = write("my_loop.py", code)
    assert main([f"{path}:Loss"]) == 2
    error = capsys.readouterr().err
    line = {"import": 1, "call": 7, "caught": 8}[where]
    assert error.count("\n") == 1 and "took longer than 2 s" in error
    assert f"({path}:{line})" in error


def test_what_a_base_class_has_hides_nothing_of_the_authors(write):
    """The base class has another fault in the same probe: of a metric, or of fewer tensors."""
    text = """
        import torch
        from nemo_rl_ref.algorithms.loss import DPOLossFn, MseValueLossFn

        class Mean(MseValueLossFn):
            def __call__(self, *args, **named):
                loss, metrics = super().__call__(*args, **named)
                return loss * named["global_valid_toks"], metrics

        class More(DPOLossFn):
            def __call__(self, next_token_logprobs, data, seqs=None, toks=None, **counts):
                loss, metrics = super().__call__(next_token_logprobs, data, **counts)
                return loss + 0 * (data["generation_logprobs"] * data["token_mask"]).sum(), metrics
    """
    path = write("my_more.py", textwrap.dedent(text))
    assert check_loss(build_loss(find("nemo_rl_ref.algorithms.loss:MseValueLossFn"), [])).own == ()
    report = check_loss(build_loss(find(f"{path}:Mean"), []), only=["micro-batches"])
    assert report.own == ("micro-batches",)
    report = check_loss(build_loss(find(f"{path}:More"), []), only=["masks"])
    assert report.own == ("masks",)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("1 / 0", "batch_maker(seed=0, dtype=torch.float64): raises ZeroDivisionError"),
        ("import sys; sys.exit(0)", "batch_maker(seed=0, dtype=torch.float64): raises SystemExit"),
        ("while True: pass", "took longer than 2 s"),
    ],
)
def test_a_batch_maker_that_does_not_answer_is_one_error_with_its_line(
    write, capsys, monkeypatch, code, words
):
    monkeypatch.setattr("nemo_rl_ref.contract.limits.SECONDS", 2.0)
    sys.modules.pop("my_maker", None)
    path = write("my_maker.py", f"def maker(seed, dtype):\n    {code}\n\nclass Maker: ...\n")
    assert main([NLL, "--batch-maker", f"{path}:maker"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and f"({path}:2)" in error
    assert main([NLL, "--batch-maker", f"{path}:Maker"]) == 2
    assert f"Maker ({path}:4), no function" in capsys.readouterr().err
