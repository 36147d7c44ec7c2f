"""The project speaks the field's language: words it does not write, terms it explains, references to lessons.

The tables in `reports/` are what the studies last produced, and may be older than a word's change; they and
the outputs that the notebooks of `nbs/reports` take from them are not read here.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import NOTEBOOKS, ROOT, read_notebook

LESSONS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
GLOSSARY = ROOT / "nbs/glossary.ipynb"
READ = ("README.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile", "MANIFEST.in", "settings.ini", "setup.py",
        "pyproject.toml", "_quarto.yml", "nbs/styles.css", "course_ml/weights/*.md", ".github/**/*.*", ".githooks/*",
        "tests/**/*.py", "tools/**/*.py", "tools/**/*.txt")
IN_NAME, NAME_ENDS = r"(?<![A-Za-z])", r"(?![A-Za-z])"  # also inside a name with underscores


class Rule(NamedTuple):
    pattern: str  # what is not written, whatever its case
    instead: str
    code_only: bool = False  # a usual word in prose


class Allowed(NamedTuple):
    file: str  # a glob
    pattern: str  # must cover the hit
    reason: str


def name(*words: str) -> str:
    "A pattern for words that stand alone or as a part of a name with underscores."
    return f"{IN_NAME}(?:{'|'.join(words)}){NAME_ENDS}"


RULES = [
    # the table of style: general words
    Rule(r"pictur(?:e|es|ed|ing)\b", "image"),
    Rule(r"\bcan\s+not\b", "cannot"),
    Rule(name("anew"), "again"),
    Rule(r"\bby\s+heart\b", "memorize"),
    Rule(r"\bto\s+the\s+bit\b", "bit-exact"),
    Rule(name("guilty", "culprits?", r"accus(?:e|es|ed|ing|ation|ations)"), "label error, flag"),
    Rule(name("detectives?"), "detector"),
    Rule(name(r"suspicio\w+"), "label-issue score, flagged"),
    Rule(r"\bwrong(?:ly)?[\s_]+label\w*|\bmis-label\w*", "label error, mislabeled"),
    Rule(r"\b(?:wrong|right)[\s_]+(?:predictions?|answers?)\b|\bmost(?:\s+confidently)?\s+wrong\b",
         "correct, incorrect, error"),
    Rule(name("thaw(?:s|ed|ing)?"), "unfreeze"),
    Rule(r"freezing[\s_]plans?", "unfreezing schedule"),
    Rule(name("twins?"), "duplicate, near duplicate; counterpart"),
    Rule(r"\b(?:exact|near)[\s-]+cop(?:y|ies)\b", "exact duplicate, near duplicate"),
    Rule(name("miniatures?", "minis?", "procedural(?:ly)?"), "synthetic data set"),
    Rule(r"\bmini-batch(?:es)?\b", "minibatch"),
    Rule(r"\bopened\s+once\b|\bopen(?:s|ed|ing)?\s+the\s+test\b", "evaluated once, held out"),
    Rule(r"\b(?:training|test|validation|held-out|unlabell?ed)[\s_]+parts?\b",
         "training, validation or test set; split"),
    Rule(r"\bpart\s*=|\.parts?\b\s*\(|\bfolds\.parts?\b|\bparts?\s*==", "split", code_only=True),
    Rule(r"\bgraphics\s+cards?\b|\bNVIDIA\s+cards?\b", "GPU"),
    Rule(r"\bprocessors?\b", "CPU"),
    Rule(r"\bby\s+chance\b|\bchances?\s+alone\b", "randomness, at random"),
    Rule(r"\bwhole\s+or\s+(?:absent|not)\b", "atomic, complete"),
    Rule(r"\b(?:published|printed|reported)\s+figures?\b|\bfigures\s+of\s+others\b", "published value, score"),
    Rule(r"\b(?:set|seen|measured|judged|study|studies)\s+beside\b|\bbeside\s+(?:what|those|(?:the\s+)?published)\b",
         "compared with"),
    # names of predictions and of parameters that have a standard name
    Rule(r"\bsaid\s*(?:=|\.\w|[\[):])|\bsaid\s+in\b|\bin\s+said\b|\(said\b|_said\b|\bsaid_",
         "predictions, preds; message", code_only=True),
    Rule(r"\b(?:out-of-fold|model'?s'?|network'?s'?|models?|networks?|their|its)\s+answers?\b", "predictions"),
    Rule(name("answers"), "predictions, preds; labels; responses", code_only=True),
    Rule(r"\bwatch(?=\s*[=(,:)])", "callback", code_only=True),
    Rule(name("facts"), "metadata, info", code_only=True),
    Rule(r"`facts`", "metadata, info"),
    Rule(r"\bviews\s*=|\bview_\w+|\w+_views\b", "tta, test-time augmentation", code_only=True),
    Rule(r"\btest-time\s+views?\b|\bmean\s+over\s+(?:several\s+)?views\b", "test-time augmentation"),
    Rule(r"\bdeal_\w+|\bdealt\b|\bdeal(?:s|ing)?\s+(?:out|groups?|the\s+groups?)\b", "assign, split"),
    Rule(name("sheets?"), "image grid, summary table"),
    Rule(r"\bspread\(|[\"'`]spread[\"'`]|_spread\b|\b(?:an?|the|mean\s+and)\s+spread\b|\bspread\s+\d",
         "standard deviation"),
    Rule(r"\bclip_norm\b", "max_grad_norm"),
    Rule(r"\bhead_penalty\b", "head_l2"),
    Rule(r"\blowest_rate\b", "min_lr"),
    Rule(r"(?<!\.)\baccumulate\s*[=:]", "grad_accum_steps", code_only=True),
    Rule(r"\baverage\s*[=:]\s*\.?\d", "ema_decay", code_only=True),
    Rule(r"\bcompiled\s*=", "compile", code_only=True),
    # names that were
    Rule(r"(?-i:\bFolds\b)(?! [a-z])", "Split", code_only=True),
    Rule(r"`(?-i:Folds)\b", "Split"),
    Rule(r"\bcourse_ml\.(?:core|minis)\b|\b00_core\b|\b01a_minis\b", "the module that holds it now"),
    Rule(r"\bopen_test\b", "evaluate_test"),
    Rule(r"\brecipe_sheet\b", "recipe_table"),
    # American spelling, in names as well; codespell reads whole words of prose
    Rule(r"colour", "color"),
    Rule(r"gr[e]y(?=s?\b|_|scale|ed|ing)", "gray"),
    Rule(r"neighbour", "neighbor"),
    Rule(r"behaviour|favour|honour", "behavior, favor, honor"),
    Rule(r"\bcentr(?:e|es|ed|ing)(?![a-z])|_centre", "center"),
    Rule(r"\blicence", "license"),
    Rule(r"\b(?:un|mis|re)?labell(?:ed|ing)\b", "labeled, labeling"),
    Rule(r"(?:normal|standard|regular|general|optim|initial|visual|serial|summar|recogn|real|categor|quant|vector"
         r"|parametr|parameter|minim|maxim|character|local|penal|random|equal|memor|organ|symmetr|binar|factor"
         r"|capital|parallel|util|custom|special|final|priorit|discret|color|stabil|synchron)is(?:e|ed|es|er|ing|ation|ations)\b",
         "-ize, -ization"),
    Rule(r"\banalys(?:e|ed|ing)\b", "analyze"),
]

ALLOWED = [
    Allowed("CONTRIBUTING.md", r"^\|[^|\n]*\|[^|\n]*\|$", "the table of words itself"),
    Allowed("nbs/**", r"(?i)stylesheets?|spreadsheets?|data\s?sheets?", "other things than image grids"),
    Allowed("nbs/library/table_files.ipynb", r"(?i)\b_?sheets?\b", "what Excel calls a table in a file"),
    Allowed("tests/test_tables.py", r"(?i)\b_?sheets?\b", "what Excel calls a table in a file"),
    Allowed("nbs/library/configuration.ipynb", r"^RENAMED = \{[^}]*\}", "the former names of fields, answered with the new ones"),
    Allowed("nbs/library/layout.ipynb", r"^PLAIN_NAMES = \{[^}]*\}", "names that other people give their folders"),
    Allowed("pyproject.toml", r"Greys|greys", "the name of Matplotlib's color map"),
    Allowed("*", r"""(["'])Greys\1""", "the name of Matplotlib's color map"),
    Allowed("*", r"platform\.processor", "a function of Python"),
]

TERMS = ["overfitting", "underfitting", "generalization", "regularization", "hyperparameter", "backpropagation",
         "gradient descent", "minibatch", "fully connected layer", "confidence interval", "ground truth",
         "class imbalance", "data augmentation", "feature extraction", "fine-tuning", "receptive field",
         "deterministic"]


class Passage(NamedTuple):
    where: str  # the file and, in a notebook, the cell, counted from 1
    text: str
    is_code: bool


def passages(path: Path) -> list[Passage]:
    "A file, or the cells of a notebook with what they show, and its own name."
    file = str(path.relative_to(ROOT))
    named = [Passage(f"the name of {file}", file, is_code=True)]
    if path.suffix != ".ipynb":
        return [*named, Passage(file, path.read_text(encoding="utf-8"), path.suffix == ".py")]
    cells = list(enumerate(read_notebook(path).cells, 1))
    read = [Passage(f"{file}:cell {number}", cell.source, cell.cell_type == "code") for number, cell in cells]
    if path.parent.name != "reports":
        read += [Passage(f"{file}:cell {number} shows", shown(cell), is_code=False) for number, cell in cells]
    return named + read


def shown(cell) -> str:
    "What a saved cell shows in words."
    outputs = cell.get("outputs", [])
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def hits(passage: Passage, rules: list[Rule], allowed: list[Allowed]) -> list[str]:
    "Every old word of a passage as `where:line: 'word', write ...`."
    spans = [found.span() for one in allowed for found in re.finditer(one.pattern, passage.text, re.MULTILINE)]
    found = []
    for rule in rules:
        if rule.code_only and not passage.is_code:
            continue
        for hit in re.finditer(rule.pattern, passage.text, re.IGNORECASE):
            if not any(start <= hit.start() and hit.end() <= end for start, end in spans):
                line = passage.text.count("\n", 0, hit.start()) + 1
                found.append(f"{passage.where}:{line}: {hit.group()!r}, write: {rule.instead}")
    return found


def read_files() -> list[Path]:
    found = {path for pattern in READ for path in ROOT.glob(pattern)} | set(NOTEBOOKS)
    own = {Path(__file__).resolve()}  # it holds the words
    return sorted(path for path in found - own if path.is_file() and "__pycache__" not in path.parts)


@pytest.mark.parametrize("path", read_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_old_words_stay_out(path):
    file = path.relative_to(ROOT)
    allowed = [one for one in ALLOWED if file.match(one.file)]
    found = [hit for passage in passages(path) for hit in hits(passage, RULES, allowed)]
    assert not found, "\n" + "\n".join(found)


OLD = ["two pictures", "we can\nnot", "the colour_map", "normalised", "a neighbour", "the test part", "a_thawed_block", "said = 1"]
NEW = ["two images", "we cannot", "the color_map", "normalized", "the contact", "in fact", "part of it", "raised", "twinx"]


@pytest.mark.parametrize("text", OLD)
def test_an_old_word_is_found(text):
    assert len(hits(Passage("here", f"a\n{text}", is_code=True), RULES, [])) == 1


@pytest.mark.parametrize("text", NEW)
def test_a_good_word_is_not_found(text):
    assert not hits(Passage("here", text, is_code=True), RULES, [])


# The terms that a student meets in every paper


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read_notebook(path).cells if cell.cell_type == "markdown")


def has_term(text: str, term: str) -> bool:
    "Whether prose has a term, in the singular or the plural, at the beginning of a sentence or inside it."
    words = r"[\s-]+".join(re.escape(word) for word in term.split())
    return re.search(rf"\b{words}(?:s|es)?\b", text, re.IGNORECASE) is not None


@pytest.mark.parametrize("term", TERMS)
def test_term_is_taught_and_in_the_glossary(term):
    lessons = [path.stem for path in LESSONS if has_term(prose(path), term)]
    assert lessons, f"no lesson explains {term!r}"
    entry = re.search(rf"^\*\*{term}\*\*", prose(GLOSSARY), re.IGNORECASE | re.MULTILINE)
    assert entry, f"{term!r} is not in the glossary"


def test_glossary_is_in_order():
    entries = re.findall(r"^\*\*(.+?)\*\*", prose(GLOSSARY), re.MULTILINE)
    assert entries == sorted(entries, key=str.casefold)


@pytest.mark.parametrize("entry", re.split(r"\n(?=\*\*)", prose(GLOSSARY))[1:] if GLOSSARY.exists() else [],
                         ids=lambda entry: entry.split("**")[1])
def test_glossary_names_a_lesson(entry):
    assert re.search(r"\]\((?:\d\d[a-z]?_|library/)\w+\.ipynb\)", entry), f"no link to where it is taught:\n{entry}"


# Lessons have numbers, and a reference to one is a link


MENTION = re.compile(r"\blessons?\s+(\d\d[a-z]?)\b", re.IGNORECASE)
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]*)[^)]*\)")
NUMBERS = {path.name.split("_")[0]: path for path in LESSONS}


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_title_carries_the_number(path):
    number = path.name.split("_")[0]
    assert re.match(rf"# {number} \S", read_notebook(path).cells[0].source), f"the title begins with `# {number} `"


def loose_mentions(passage: Passage, folder: Path) -> list[str]:
    "References to a lesson that name none there is or, in prose, are no link to it."
    linked = {}
    for link in LINK.finditer(passage.text):
        linked |= dict.fromkeys(range(*link.span()), (folder / link.group(2)).resolve())
    found = []
    for mention in MENTION.finditer(passage.text):
        lesson = NUMBERS.get(mention.group(1))
        if lesson is None or not passage.is_code and linked.get(mention.start()) != lesson:
            line = passage.text.count("\n", 0, mention.start()) + 1
            found.append(f"{passage.where}:{line}: {mention.group()!r} is not a link to that lesson")
    return found


@pytest.mark.parametrize("path", [path for path in read_files() if path.suffix in (".ipynb", ".md", ".py")],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_references_to_lessons_are_links(path):
    read = [passage for passage in passages(path) if not passage.where.endswith("shows")]
    found = [mention for passage in read for mention in loose_mentions(passage, path.parent)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_links_to_notebooks_exist(path):
    targets = [target for _, target in LINK.findall(prose(path)) if target.endswith(".ipynb") and "://" not in target]
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing, f"no such notebooks: {missing}"
