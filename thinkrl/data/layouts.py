"""Convert rows of public data sets to problems.

    question      problem | question; a text in prompt; the user's message of prompt or messages (TRL,
                  verl), with their system message; before it context (OlympiadBench) or body (SVAMP, ASDiv)
    answer        answer | final_answer | expected_answer | ground_truth | reward_model.ground_truth (verl),
                  as text, number or list; else the solution's answer after the marker of its grading rule ("…
                  #### 42")
    solution      solution | rationale | extra_info.answer (verl) | the assistant's message
    options       options | choices, and answer | correct | answer_index: the right one's text, letter, or
                  index from 0 (MMLU, MMLU-Pro, AQuA); or GPQA's columns "Correct Answer", "Incorrect Answer
                  1" …; or a question that ends in "Candidate answer: (1) …, or (2) …" (Long⊗Short's GPQA)
    rule          source | data_source; else gsm8k if the answer has its marker "####", else math

Upper and lower case of names does not matter (AIME's "Problem", SVAMP's "Body"). `--columns` maps columns
with other names, `--source` overrides the rule that rows name.

Options are shuffled by a hash of the question, because published files often list the right one first. A row
of DAPO-Math-17k contains a request for a line "Answer: …"; it is removed, or the prompt would ask for two
answer formats.
"""

from __future__ import annotations

import json
import random
import re
from string import ascii_uppercase

from thinkrl import UserError
from thinkrl.data.rows import Fields
from thinkrl.grading import check_gold, equal, extract, rational, rule_set
from thinkrl.types import Problem

# Origins that rows of OpenR1-Math, NuminaMath, Big-Math and Skywork-OR1 name in `source` or `data_source`,
# reduced to letters and digits in lower case. They do not name a grading rule; all are mathematics with a
# LaTeX answer.
ORIGINS = {
    *(
        "aopsforum",
        "amcaime",
        "cncontest",
        "cnk12",
        "inequalities",
        "metamath",
        "numbertheory",
        "olympiads",
        "olympiadsref",
    ),
    *(
        "orcamath",
        "syntheticamc",
        "syntheticmath",
        "bigmath",
        "bigmathreformulated",
        "harp",
        "hendrycksmath",
        "omnimath",
    ),
    *("deepscaler", "still3"),
}
PLACEHOLDERS = ("proof", "notfound")  # NuminaMath's answers to problems that have none

ANSWER = ("answer", "final_answer", "expected_answer", "ground_truth")
SOLUTION = ("solution", "rationale")
GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
CANDIDATES = re.compile(r"\s*Candidate answers?:\s*(?=\(1\))")
DAPO_WRAPPER = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of the form "
    r"Answer: "
    r".{1,60}? is the answer to the problem\.\n\n(.*?)\s*Remember to put your answer on its own line after "
    r"\"Answer:\"[^\n]*",
    re.DOTALL | re.IGNORECASE,
)


def problem(
    fields: Fields, source: str = "", shuffle: bool = True, verbatim: bool = False, keep_row: bool = False
) -> Problem:
    """Make a problem, with id 0, from a row. Raises UserError, naming the field, for a row without one.

    source: grading rule that overrides the row's. shuffle: shuffle the options, else keep the row's order.
    verbatim: use the prompt unchanged, without a grading instruction. keep_row: the problem keeps its row.
    """
    question, system, solution = _asked(fields)
    solution = _solution(fields) or solution
    question, options, right = _options(question, fields)
    column, answer = _answer(fields) if not options else ("", "")
    if not question:
        raise fields.error(
            "field 'problem' (or question, prompt) is missing or empty"
            + fields.remedy("problem", "question", "prompt")
        )
    question = with_context(question, fields)
    if options:
        order = random.Random(f"options/{question}").sample(range(len(options)), len(options))
        order = order if shuffle else sorted(order)
        lines = [f"({letter}) {options[i]}" for letter, i in zip(ascii_uppercase, order)]
        question = "\n".join([question, *lines, "Answer with the letter of one option."])
        answer = ascii_uppercase[order.index(right)]
        solution = "" if shuffle else solution  # it refers to the row's order of options
    elif not verbatim and (wrapped := DAPO_WRAPPER.fullmatch(question.strip())):
        question = wrapped[1]
    source = _rule(fields, source, "gsm8k" if "####" in (answer or solution) else "math")
    gold = _gold(fields, column or ANSWER[0], answer, solution, source)
    return Problem(
        id=0,
        question=question,
        answer=gold,
        source=source,
        level=fields.text("level"),
        solution=solution or answer,
        system=fields.text("system") or system,
        instruct=not verbatim,
        row=fields.values if keep_row else None,
    )


def with_context(question: str, fields: Fields) -> str:
    """Question with the row's context, if any, before it."""
    column, value = fields.find("context", "body")
    context = fields.as_text(column, value)
    # SVAMP's and ASDiv's body is one text with the question
    between = " " if column == fields.column("body") else "\n"
    return f"{context}{between}{question}" if context else question


def _asked(fields: Fields) -> tuple[str, str, str]:
    """Question, system message and assistant's message; "" for a missing one."""
    names = ("problem", "question", "prompt", "messages")
    column, value = fields.find(*(("prompt", *names) if "reward_model" in fields else names))
    if not isinstance(value, list):
        return fields.as_text(column, value), "", ""
    roles = [
        m.get("role") if isinstance(m, dict) and isinstance(m.get("content"), str) else None for m in value
    ]
    texts = {role: m["content"] for role, m in zip(roles, value) if role}
    if [role for role in ("system", "user", "assistant") if role in texts] != roles or "user" not in texts:
        raise fields.error(
            f"field {column!r} must be a list of messages, [system,] user[, assistant], each with role and "
            "content"
        )
    return texts["user"], texts.get("system", ""), texts.get("assistant", "")


def _solution(fields: Fields) -> str:
    """Worked solution; the first if there are several."""
    column, value = fields.find(*SOLUTION)
    if isinstance(value, list):
        value = value[0]
    extra = fields.values.get("extra_info")
    if value is None and isinstance(extra, dict):  # verl's GSM8K
        column, value = "extra_info.answer", extra.get("answer")
    return fields.as_text(column, value)


def _answer(fields: Fields) -> tuple[str, str]:
    """Column and text of the row's answer, "" if it has none; all of a list, such as OlympiadBench's ["$8$",
    "$4$"].
    """
    if "reward_model" in fields and "answer" not in fields.columns:
        column, model = fields.find("reward_model")
        column += ".ground_truth"
        value = model.get("ground_truth") if isinstance(model, dict) else None
        if value in (None, "", []):
            raise fields.error(f"field {column!r} is missing or empty")
        value = json.dumps(value) if isinstance(value, list) else value  # spellings, see _gold
    else:
        column, value = fields.find(*ANSWER)
    answer = ", ".join(fields.as_text(column, part) for part in value) if isinstance(value, list) else ""
    answer = answer or fields.as_text(column, value)
    if "formula" in fields and "body" in fields:  # ASDiv: "9 (apples)", "3 (apples); 2 (pears)"
        answer = re.sub(r"\s*\([^()]*\)", "", answer).replace(";", ",")
    if answer.strip().lower() in PLACEHOLDERS:
        raise fields.error(f"field {column!r} is {answer!r}: the problem has no answer that could be graded")
    return column, answer


def _rule(fields: Fields, source: str, default: str) -> str:
    """Name that selects the grading rule: `source`, else the row's, else its dataset's name, else the
    default.
    """
    own = fields.text("source", "data_source")
    try:
        rule_set(source or own)
        return source or own
    except UserError as error:
        origin = re.sub(r"^(trainmath)?(numinamath15|numina)?", "", re.sub(r"[^a-z0-9]", "", own.lower()))
        if source or own and origin not in ORIGINS:
            raise fields.error(
                f"field 'source': {error}; --source RULE grades every row by that rule"
            ) from None
    if own:
        return "math"
    try:
        rule_set(fields.dataset)
        return fields.dataset
    except UserError:
        return default


def _gold(fields: Fields, column: str, answer: str, solution: str, source: str) -> str:
    """Gold answer: after the rule's marker in the answer or else the solution, or the answer itself."""
    if answer.startswith('["'):  # Skywork-OR1: a JSON list of spellings, each of them right
        answer, *others = _spellings(fields, column, answer)
        if any(not equal(other, answer, source) for other in others):
            raise fields.error(
                f"field 'reward_model.ground_truth' has different answers: {[answer, *others]}"
            )
    written = answer or solution
    gold = extract(written, source) or (extract(written, "gsm8k") if "####" in written else "") or answer
    if not gold and (whole := re.fullmatch(r"\$([^$]+)\$|(True|False|Yes|No)", solution.strip())):
        gold = whole[1] or whole[2]  # TRL's data: the answer alone, under the name "solution"
    if not gold and rational(solution.strip()) is not None:
        gold = solution.strip()
    if not gold:
        raise fields.error(
            f"field {column!r} is missing or empty, and 'solution' gives no answer" + fields.remedy(*ANSWER)
        )
    try:
        check_gold(gold, source)
    except ValueError as error:
        raise fields.error(f"field {column!r}: {error}") from None
    return gold


def _spellings(fields: Fields, column: str, text: str) -> list[str]:
    try:
        spellings = json.loads(text)
    except ValueError:
        spellings = None
    if not isinstance(spellings, list) or not all(isinstance(each, str) for each in spellings):
        raise fields.error(f"field {column!r} must be a text, or a JSON list of texts")
    return spellings


def _options(question: str, fields: Fields) -> tuple[str, list[str], int]:
    """Question without options, the options, and the right one's index; no options if not multiple choice."""
    column, options = fields.find("options", "choices")
    if column:
        needed = f"field {column!r} must be a list of 2 to {len(ascii_uppercase)} texts"
        options = (
            options if isinstance(options, list) and all(isinstance(text, str) for text in options) else []
        )
        marked = [text.removeprefix(f"{letter})") for letter, text in zip(ascii_uppercase, options)]
        options = marked if all(map(str.__ne__, marked, options)) else options  # AQuA: "A)21", "B)22"
    elif GPQA_OPTIONS[0] in fields:
        options = [fields.text(name) for name in GPQA_OPTIONS]
        needed = f"fields {', '.join(map(repr, GPQA_OPTIONS))} must be texts"
    elif found := CANDIDATES.search(question):
        options = _candidates(question[found.end() :])
        needed = "field 'problem' must list its candidate answers as '(1) …, or (2) …, or (3) …'"
        question = question[: found.start()]
    else:
        return question, [], 0
    options = [text.strip() for text in options]
    if not all(options) or not 2 <= len(options) <= len(ascii_uppercase):
        raise fields.error(f"{needed}, none of them empty")
    right = 0 if GPQA_OPTIONS[0] in fields else _right_option(fields, options, column)
    if options.count(options[right]) > 1:  # a wrong one may come twice, as it does in published files
        raise fields.error(f"the right option, {options[right]!r}, is among the options twice")
    return question, options, right


def _candidates(text: str) -> list[str]:
    """Options of "(1) …, or (2) …, or (3) …"; none if they are not numbered 1, 2, 3, …"""
    _, *parts = re.split(r"(?:^|,\s*or\s*)\((\d+)\)", text)
    numbers, options = parts[::2], parts[1::2]
    return options if numbers == [str(i) for i in range(1, len(options) + 1)] else []


def _right_option(fields: Fields, options: list[str], column: str) -> int:
    """Index of the right option: the answer is a number (index from 0), an option's text, or its letter."""
    index = fields.find("answer_index")[1]
    name, answer = (column, index) if index is not None else fields.find("answer", "correct")
    if isinstance(answer, int) and not isinstance(answer, bool):
        places = {answer} & set(range(len(options)))
        if column == "options" and str(answer) in options and index is None:
            places.add(options.index(str(answer)))
    else:
        answer = fields.as_text(name, answer).strip()
        places = {options.index(answer)} if answer in options else set()
        if letter := re.fullmatch(r"\(?([A-Z])[).]?", answer):
            places |= {ascii_uppercase.index(letter[1])} & set(range(len(options)))
    if len(places) > 1:
        raise fields.error(
            f"{answer!r} is one option's text and another's letter or place: add a field 'answer_index'"
        )
    if not places:
        raise fields.error(
            f"field 'answer' must be one of the options, to the letter, or its letter or place: {answer!r} "
            "is none"
        )
    return places.pop()
