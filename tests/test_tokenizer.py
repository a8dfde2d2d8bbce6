"""Chat templates against transformers, stop strings and incremental text against decoding everything
again.
"""

import json
import random

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from thinkrl import UserError
from thinkrl.tokenizer import IncrementalText, StopStrings, Tokenizer, find_stop_ref

CORPUS = [
    "<think>\nFirst we add 2 and 3.\n</think>\n\nThe answer is 5.",
    "<think>Wait.</think>\n\n5",
    "</think>\n\n</think>\n\n</think>\n\n \\boxed{5} naïve café 答案是五。 😀😃 -> x > y",
] * 3
SPECIAL = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if loop.first and message.role != 'system' %}\n"
    "        {{- '<|user|>system\\nBe brief.<|end|>\\n' }}\n"
    "    {%- endif %}\n"
    "    {{- '<|user|>' + message['role'] + '\\n' + message.content + '<|end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|assistant|>assistant\\n' }}\n"
    "{%- endif %}\n"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% set text = '<|user|>' + message['role'] + '\\n\\n'"
    " + message['content'] | trim + eos_token %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# What templates on the hub use besides: namespaces, macros, loop controls, tojson, generation blocks, an
# undefined tool list.
EVERYTHING = """{% set ns = namespace(count=0) %}
{% macro turn(m) %}{{ m.role | upper }}: {{ m | tojson }}{% endmacro %}
{% for m in messages %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}{{ turn(m) }}{% endgeneration %}

    {% if ns.count == 3 %}{% break %}{% endif %}
{% endfor %}
{{ bos_token }}{% if tools %}tools{% endif %}{% if pad_token is defined %}pad{% endif %}{{ strftime_now('%Y') }}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""
CHAT = [
    {"role": "system", "content": 'Answer <b>"carefully"</b> & kindly, 答案。 '},
    {"role": "user", "content": "What is 2+3?\n"},
    {"role": "skip", "content": "not this"},
    {"role": "assistant", "content": "<think>\n2+3=5\n</think>\n\n5"},
    {"role": "user", "content": " And 3+4?"},
]


def byte_level() -> tokenizers.Tokenizer:
    """As in Qwen and Llama 3: tokens are bytes, and merges run across ">" and line ends."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        tokenizers.Regex(r"\s?\w+|[^\w\s]+\n*|\s"), behavior="isolated"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_like() -> tokenizers.Tokenizer:
    """As in Llama 2: a mark for spaces that decoding drops at the start, and byte tokens for unknown
    characters.
    """
    pieces = [*"▁abcdehiknrstw<>/.\n", "▁a", "▁the", "think", "</", "</think", ">\n", "▁</", "in"]
    vocabulary = ["<unk>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    merges = [("▁", "a"), ("<", "/"), (">", "\n"), ("▁", "</"), ("i", "n")]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_folder(path, tokenizer=None, template=None, **config):
    path.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level()).save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "bos_token": "<|begin|>",
    } | config
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module", params=[byte_level, sentencepiece_like])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp(request.param.__name__), request.param()))


@pytest.mark.parametrize("template", [CHATML, LLAMA, EVERYTHING], ids=["chatml", "llama", "everything"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_rendered_chat_and_its_ids_are_those_of_transformers(template, add_generation_prompt, tmp_path):
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    ours = Tokenizer(write_folder(tmp_path, tokenizer, template))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for chat in (CHAT, CHAT[1:2]):
        options = {"add_generation_prompt": add_generation_prompt}
        assert ours.render_chat(chat, **options) == theirs.apply_chat_template(
            chat, tokenize=False, **options
        )
        ids = ours.encode_chat(chat, **options)
        assert ids == theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
        # one beginning of sequence where the template writes it, else none
        assert ids.count(0) == (template != CHATML)
        assert ours.decode(ids) == theirs.decode(ids)


def test_templates_are_found_where_transformers_looks_for_them(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": LLAMA}]
    folder = write_folder(tmp_path / "named", template=named)
    assert Tokenizer(folder).render_chat(CHAT) == Tokenizer(
        write_folder(tmp_path / "one", template=LLAMA)
    ).render_chat(CHAT)
    (folder / "chat_template.jinja").write_text(CHATML)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert Tokenizer(folder).render_chat(CHAT) == theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )


def test_a_base_model_gets_the_contents_and_the_one_token_its_tokenizer_starts_with(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
    assert Tokenizer(write_folder(tmp_path / "without")).render_chat(chat) == "Be brief.\n\n2+3?"
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    ours = Tokenizer(write_folder(tmp_path / "with", tokenizer))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "with")
    assert ours.encode_chat(chat) == theirs("Be brief.\n\n2+3?")["input_ids"]
    assert ours.encode("2+3?") == theirs("2+3?", add_special_tokens=False)["input_ids"]


def test_special_tokens_are_read_in_every_layout_and_all_stop_ids_are_honoured(tmp_path):
    folder = write_folder(tmp_path / "a", eos_token={"content": "<|end|>", "special": True}, bos_token=None)
    assert Tokenizer(folder).stop_ids == [1] and Tokenizer(folder).eos_id == 1
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    tokenizer = Tokenizer(folder)
    assert tokenizer.stop_ids == [1, 2, 3]
    assert tokenizer.decode([1, 3]) == "<|end|><|assistant|>"

    (tmp_path / "b").mkdir()
    tokenizer.save(tmp_path / "b")
    saved = Tokenizer(tmp_path / "b")
    assert saved.stop_ids == [1, 3]  # config.json is the model's to write
    assert saved.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


def test_a_stop_string_is_seen_where_the_vocabulary_merges_it_away(tmp_path):
    tokenizer = Tokenizer(write_folder(tmp_path))
    tokens = tokenizer.encode("5</think>\n\nso 5")
    texts = [tokenizer.decode([token]) for token in tokens]
    straddling = next(i for i, text in enumerate(texts) if ">\n\n" in text)
    assert tokenizer.encode("</think>")[-1] not in tokens
    assert StopStrings(tokenizer, ["</think>"]).find(tokens) == straddling
    assert StopStrings(tokenizer, ["<think>", "</think>"]).find(tokens, start=straddling) == straddling
    assert StopStrings(tokenizer, ["</think>"]).find(tokens, start=straddling + 1) is None
    assert StopStrings(tokenizer, ["</thing>"]).find(tokens) is None
    assert StopStrings(tokenizer, []).find(tokens) is None
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert StopStrings(tokenizer, ["ab"]).find([a, b, b]) == 1
    assert StopStrings(tokenizer, ["ab"]).find([a, b, b], start=2) is None  # found once, not again
    # a padded id is no text
    assert StopStrings(tokenizer, ["5"]).find([tokenizer.vocab_size + 7, tokens[0]]) == 1


STOPS = [["</think>"], ["</think>", "the a"], ["。"], ["案。>"], ["é", "n\n"], [" "], ["a"], ["<|end|>"]]
STOPS += [["\n\n", "😀😃"], ["答 the"]]  # the latter begins in byte tokens and ends in one of many bytes


@pytest.mark.parametrize("stops", STOPS, ids=repr)
def test_stop_strings_are_found_where_decoding_everything_finds_them(tokenizer, stops):
    rng = random.Random(0)
    matcher = StopStrings(tokenizer, stops)
    noise = list(range(tokenizer.vocab_size))
    # its decoder gives up a whole run of bytes for one bad byte, however far back
    if "sentencepiece" in tokenizer.path.name:
        noise = [i for i in noise if "\ufffd" not in tokenizer.pieces[i]]
    hits = 0
    for trial in range(150):
        # Fragments of the stop strings, in ids that no encoder would choose, between random tokens.
        tokens = []
        while len(tokens) < 12:
            text = rng.choice(stops)
            cut = rng.randrange(len(text) + 1)
            tokens += (
                tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) if rng.random() < 0.4 else []
            )
            tokens += rng.choices(noise, k=rng.randrange(3)) + tokenizer.encode(
                rng.choice(["", "é", "答", "😀"])
            )
        expected = find_stop_ref(tokenizer, stops, tokens)
        assert matcher.find(tokens) == expected, (trial, [tokenizer.decode([token]) for token in tokens])
        hits += expected is not None
    assert hits > 5


def test_a_token_may_end_one_character_and_hold_the_rest_of_a_stop_string(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # é is two bytes
    first, second = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é")[0][0]
    ids = {piece: i for i, piece in enumerate([*alphabet, second + ">"])}
    plain = tokenizers.Tokenizer(models.BPE(ids, []))
    plain.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(write_folder(tmp_path, plain))
    assert tokenizer.decode([ids[first], ids[second + ">"]]) == "é>"
    assert StopStrings(tokenizer, ["aé>"]).find([ids["a"], ids[first], ids[second + ">"]]) == 2


def test_few_tokens_can_end_a_stop_string(tmp_path):
    tokenizer = Tokenizer(write_folder(tmp_path))
    endings = {tokenizer.pieces[i] for i in StopStrings(tokenizer, ["</think>"]).endings}
    assert ">" in endings and "<" not in endings and "think" not in endings
    assert all(">" in piece for piece in endings) and len(endings) < 10


def test_text_comes_in_parts_that_join_to_the_whole(tokenizer):
    for text in CORPUS:
        ids = tokenizer.encode(text)
        stream = IncrementalText(tokenizer)
        parts = [stream.push(token) for token in ids]
        assert "".join(parts) + stream.flush() == tokenizer.continuation(ids)
        assert "\ufffd" not in "".join(parts)
        assert all(
            part
            for part, piece in zip(parts, ids)
            if tokenizer.pieces[piece].isascii() and tokenizer.pieces[piece]
        )


def test_bytes_that_are_no_text_neither_stall_nor_spoil_what_follows(tokenizer):
    lone = next(i for i, piece in enumerate(tokenizer.pieces) if piece == "\ufffd")
    stream = IncrementalText(tokenizer)
    text = ""
    for _ in range(1000):
        text += stream.push(lone)
        assert len(stream._pending) <= 7
    assert len(text) == 997  # all but those that a fourth byte could still turn into a character
    text += stream.push(tokenizer.encode("a.")[-1])
    assert text == "\ufffd" * 1000 + "." and stream.flush() == ""


def test_random_bytes_read_the_same_in_parts_as_whole(tmp_path):
    tokenizer = Tokenizer(write_folder(tmp_path))
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(30)]
        stream = IncrementalText(tokenizer)
        text = "".join([stream.push(token) for token in ids]) + stream.flush()
        assert text.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def test_templates_cannot_leave_the_sandbox(tmp_path):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UserError, match="the chat template refuses this conversation"):
        Tokenizer(write_folder(tmp_path, template=template)).render_chat(CHAT)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json: file not found"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer.json: not a readable tokenizer"),
        (
            lambda path: (path / "tokenizer_config.json").write_text("{"),
            "tokenizer_config.json: not readable as JSON",
        ),
        (
            lambda path: (path / "tokenizer_config.json").write_text("[]"),
            "tokenizer_config.json: a JSON object is expected",
        ),
        (
            lambda path: (path / "generation_config.json").write_text("?"),
            "generation_config.json: not readable as JSON",
        ),
        (lambda path: write_folder(path, eos_token="</s>"), "eos_token is missing or not in the vocabulary"),
        (
            lambda path: write_folder(path, template="{% if %}"),
            "tokenizer_config.json: the chat template is not valid Jinja",
        ),
        (
            lambda path: write_folder(path, template="{{ raise_exception('roles must alternate') }}"),
            "roles must alternate",
        ),
        (
            lambda path: write_folder(path, template=[{"name": "rag", "template": ""}]),
            r"\['rag'\] is named default",
        ),
    ],
)
def test_a_bad_folder_is_one_sentence(spoil, words, tmp_path):
    spoil(write_folder(tmp_path))
    with pytest.raises(UserError, match=words) as caught:
        tokenizer = Tokenizer(tmp_path)
        tokenizer.render_chat(CHAT)
        assert tokenizer.eos_id in tokenizer.stop_ids
    assert str(tmp_path) in str(caught.value)


def test_an_empty_chat_and_an_empty_stop_string_are_refused(tokenizer):
    with pytest.raises(UserError, match="at least one message"):
        tokenizer.render_chat([])
    with pytest.raises(UserError, match="empty stop string"):
        StopStrings(tokenizer, ["a", ""])
