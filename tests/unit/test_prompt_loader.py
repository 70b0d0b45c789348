"""Rows to prompts, and the order in which they are dealt: a function of seed and epoch."""

import io

import pytest
import torch
from tiny import tiny_tokenizer

from grpo_lightning.data.encode import EncodedPrompt, Encoder
from grpo_lightning.data.loader import EvalPromptLoader, PromptLoader, permutation
from grpo_lightning.data.prompts import PromptFormat
from grpo_lightning.data.stream import PromptStream, StreamingPromptLoader
from grpo_lightning.errors import ConfigError, DataError

TOKENIZER = tiny_tokenizer()
HELLO = [{"role": "user", "content": "hello"}]


def encode(rows, **options):
    fit = {name: options.pop(name) for name in ("max_prompt_tokens", "overlong") if name in options}
    tokenizer = options.pop("tokenizer", TOKENIZER)
    encoder = Encoder(tokenizer=tokenizer, form=PromptFormat(**options), **fit)
    return encoder.encode_all(rows, range(len(rows)), "data")


# Rows become prompts.


def test_text_is_tokenised_as_it_is_and_other_columns_are_kept():
    (item,) = encode([{"prompt": "hi", "answer": 3, "meta": {"a": [1]}}])
    assert item == EncodedPrompt(
        prompt="hi", prompt_ids=TOKENIZER("hi")["input_ids"], columns={"answer": 3, "meta": {"a": [1]}}, uid=0
    )


def test_messages_go_through_the_chat_template_with_the_generation_prompt():
    (item,) = encode([{"prompt": HELLO}])
    assert item.prompt == HELLO
    assert TOKENIZER.decode(item.prompt_ids) == "<bos>user: hello\nassistant: "


def test_chat_template_kwargs_reach_the_template():
    tokenizer = tiny_tokenizer("{{ messages[0]['content'] }}{% if thinking %}<think>{% endif %}")
    (item,) = encode([{"prompt": HELLO}], tokenizer=tokenizer, chat_template_kwargs={"thinking": True})
    assert tokenizer.decode(item.prompt_ids) == "hello<think>"
    with pytest.raises(ConfigError, match="chat_template_kwargs has tokenize, which is set here"):
        PromptFormat(chat_template_kwargs={"tokenize": False})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"conversational": True}, HELLO),
        ({"system_prompt": "be brief"}, [{"role": "system", "content": "be brief"}, *HELLO]),
        ({"prompt_template": "{prompt} {{{answer}}}", "conversational": False}, "hello {3}"),
        ({"columns": {"prompt": "answer", "answer": "prompt"}, "prompt_column": "answer"}, "hello"),
    ],
)
def test_options_shape_the_prompt(options, expected):
    (item,) = encode([{"prompt": "hello", "answer": 3}], **options)
    assert item.prompt == expected


def test_a_template_hides_only_the_prompt_column():
    (item,) = encode(
        [{"question": "q", "answer": 3}], prompt_template="{question}?", columns={"gold": "answer"}
    )
    assert item.prompt == "q?"
    assert item.columns == {"question": "q", "gold": 3}


def test_a_column_that_a_row_lacks_is_none():
    items = encode([{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}])
    assert [item.columns for item in items] == [{"x": 1, "y": None}, {"x": None, "y": 2}]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "the prompt is null; it must be a text or a list of messages, not empty"),
        (" ", "the prompt is ' '; it must be"),
        ([], r"the prompt is \[\]; it must be"),
        (3, "the prompt is a int; it must be"),
        (["hello"], "message 0: expected .*, got str; write messages as objects"),
        ([{"role": "user"}], "message 0: 'content' is missing; it must be a text"),
        ([*HELLO, {"role": "", "content": "x"}], "message 1: 'role' is ''; it must be a text"),
        (
            [*HELLO, {"role": "assistant", "content": "x"}],
            "the last message is the assistant's; move the answer",
        ),
    ],
)
def test_an_unusable_prompt_is_named_by_its_row(prompt, says):
    with pytest.raises(DataError, match=f"^data, row 1(,|:) {says}"):
        encode([{"prompt": "a"}, {"prompt": prompt}])


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        (
            {"prompts": "a"},
            {},
            r"no column 'prompt' \(did you mean 'prompts'\? allowed: prompts\); set data.prompt_c",
        ),
        (
            {"q": "a"},
            {"prompt_template": "{question}"},
            r"no column 'question' .*; data.prompt_template names it",
        ),
        ({"q": "a"}, {"columns": {"prompt": "question"}}, r"no column 'question' .*; data.columns names it"),
        (
            {"prompt": "a", "b": 1},
            {"columns": {"prompt": "b"}},
            "data.columns renames to prompt, which exists",
        ),
        ({"q": None}, {"prompt_template": "{q}"}, "column 'q' is null, but data.prompt_template needs it"),
        ({"q": "a"}, {"prompt_template": "{q:d}"}, "data.prompt_template cannot be filled: ValueError"),
        (
            {"prompt": HELLO},
            {"conversational": False},
            "a list of messages, but data.conversational is false",
        ),
        ("text", {}, "expected a dict of columns, got str"),
        (
            {"prompt": [{"role": "system", "content": "s"}, *HELLO]},
            {"system_prompt": "t"},
            "the prompt has its own system message; set data.system_prompt to null",
        ),
    ],
)
def test_a_row_that_does_not_fit_the_options_is_named(row, options, says):
    with pytest.raises(DataError, match=f"^data, row 0: .*{says}"):
        encode([row], **options)


@pytest.mark.parametrize("template", ["{}", "{0}", "{a.b}", "\\boxed{", "{ x }"])
def test_a_template_with_stray_braces_is_refused_at_once(template):
    with pytest.raises(ConfigError, match=r"in braces stand names of columns.* twice: \{\{ \}\}"):
        PromptFormat(prompt_template=template)


def test_a_system_prompt_needs_messages():
    with pytest.raises(ConfigError, match=r"data.system_prompt needs messages"):
        PromptFormat(system_prompt="x", conversational=False)


def test_texts_and_messages_do_not_mix():
    with pytest.raises(
        DataError, match="row 1: the prompt is a list of messages, but earlier ones are a text"
    ):
        encode([{"prompt": "a"}, {"prompt": HELLO}])
    assert len(encode([{"prompt": "a"}, {"prompt": HELLO}], conversational=True)) == 2


def test_a_tokenizer_without_template_and_a_template_that_refuses_are_named():
    with pytest.raises(DataError, match=r"row 0: .* has no chat template; .* data.prompt_template"):
        encode([{"prompt": HELLO}], tokenizer=tiny_tokenizer(None))
    refusing = tiny_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"row 0: the chat template of .* refuses \(user\): no system role"):
        encode([{"prompt": HELLO}], tokenizer=refusing)
    with pytest.raises(DataError, match="row 0: the tokenizer makes no token"):
        encode([{"prompt": HELLO}], tokenizer=tiny_tokenizer("{{ '' }}"))


def test_overlong_prompts_are_an_error_or_dropped_or_truncated_and_counted():
    rows = [{"prompt": "abc"}, {"prompt": "abcdef"}, {"prompt": "abcd"}]
    with pytest.raises(
        DataError, match=r"row 1: .* 6 tokens, more than data.max_prompt_tokens=4; raise .* drop or"
    ):
        encode(rows, max_prompt_tokens=4)
    dropped = encode(rows, max_prompt_tokens=4, overlong="drop")
    assert [item.uid for item in dropped] == [0, 2]
    assert (dropped.num_dropped, dropped.num_truncated, dropped.longest) == (1, 0, 4)
    cut = encode(rows, max_prompt_tokens=4, overlong="left-truncate")
    assert TOKENIZER.decode(cut[1].prompt_ids) == "cdef"
    assert (cut.num_dropped, cut.num_truncated, cut.longest) == (0, 1, 4)
    with pytest.raises(DataError, match=r"data: all 3 prompts are longer"):
        encode(rows, max_prompt_tokens=2, overlong="drop")


def test_the_fingerprint_knows_prompts_and_columns():
    prints = [
        encode([{"prompt": "a", "answer": 1}]),
        encode([{"prompt": "a", "answer": 2}]),
        encode([{"prompt": "b", "answer": 1}]),
        encode([{"prompt": "a", "answer": 1}], conversational=True),
    ]
    assert len({prompts.fingerprint for prompts in prints}) == 4
    assert (
        encode([{"prompt": "a", "answer": object()}]).fingerprint
        == encode([{"prompt": "a", "answer": object()}]).fingerprint
    )


# Prompts are dealt.


def prompts(n):
    return [EncodedPrompt(prompt=f"p{i}", prompt_ids=[i], columns={"answer": i}, uid=i) for i in range(n)]


def loader(n=11, **options):
    return PromptLoader(prompts(n), **{"prompts_per_rollout": 4, "seed": 3, "fingerprint": "f", **options})


def seen(batches):
    return [(batch.rollout_index, batch.micro_batch, tuple(batch.uids)) for batch in batches]


def test_each_rollout_is_dealt_in_fresh_batches():
    first, second, *rest = loader(micro_batches=2)
    assert (first.micro_batch, second.micro_batch, first.micro_batches) == (0, 1, 2)
    assert first is not second
    assert first.uids == second.uids
    assert first.uids is not second.uids
    assert first.columns == {"answer": first.uids}
    assert first.prompts == [f"p{uid}" for uid in first.uids]
    assert first.prompt_ids == [[uid] for uid in first.uids]
    assert [batch.rollout_index for batch in rest] == [1, 1]


def test_every_epoch_has_its_own_order_without_repetition_and_drops_the_remainder():
    dealt = loader()
    assert (len(dealt), dealt.rollouts_per_epoch, dealt.remainder) == (2, 2, 3)
    epochs = [[uid for batch in dealt for uid in batch.uids] for _ in range(20)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 20
    assert {uid for epoch in epochs for uid in epoch} == set(range(11))
    assert seen(dealt)[0][0] == 40


def test_without_shuffling_the_order_is_that_of_the_data():
    dealt = loader(shuffle=False)
    assert [batch.uids for _ in range(2) for batch in dealt] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


def test_the_order_needs_no_global_random_state_and_leaves_it_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = seen(loader())
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert seen(loader()) == first
    assert seen(loader(seed=4)) != first
    assert permutation(50, 0, 1) != permutation(50, 1, 0)


def test_ranks_take_neighbouring_slices_of_one_block():
    whole = list(loader(12, prompts_per_rollout=6))
    ranks = [list(loader(12, prompts_per_rollout=6, rank=rank, world_size=3)) for rank in range(3)]
    for number, batch in enumerate(whole):
        assert batch.uids == [uid for rank in ranks for uid in rank[number].uids]
        assert all(len(rank[number]) == 2 for rank in ranks)
    states = [loader(12, prompts_per_rollout=6, rank=rank, world_size=3).state_dict() for rank in range(3)]
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize(("n", "allowed"), [(6, "4 or 8"), (3, "4"), (0, "4")])
def test_a_rollout_that_ranks_cannot_share_names_what_they_can(n, allowed):
    with pytest.raises(ConfigError, match=rf"prompts_per_rollout={n} .* to 4 ranks; set it to {allowed}$"):
        loader(100, prompts_per_rollout=n, world_size=4)


def test_fewer_prompts_than_one_rollout_are_refused():
    with pytest.raises(
        DataError, match=r"has 3 prompts, fewer than data.prompts_per_rollout=4; lower it to at most 3"
    ):
        loader(3)
    assert len(loader(4)) == 1
    with pytest.raises(ConfigError, match="feeds 0 micro-batches"):
        loader(micro_batches=0)


def saved(state):
    """The state as a checkpoint gives it back: plain types, or torch refuses it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_any_position_is_taken_up_at_any_world_size(micro_batches):
    original = loader(micro_batches=micro_batches)
    states, batches = [], []
    for _ in range(3):
        for batch in original:
            batches.append(batch)
            states.append(saved(original.state_dict()))
    for index, state in enumerate(states):
        resumed = [loader(micro_batches=micro_batches, rank=rank, world_size=2) for rank in range(2)]
        for rank in resumed:
            rank.load_state_dict(state)
        halves = [[batch for _ in range(3) for batch in rank] for rank in resumed]
        left = batches[index + 1 :]
        uids = [first.uids + second.uids for first, second in zip(*halves, strict=True)]
        assert uids[: len(left)] == [batch.uids for batch in left]
        assert [batch.micro_batch for batch in halves[0]][: len(left)] == [
            batch.micro_batch for batch in left
        ]
        assert [batch.rollout_index for batch in halves[0]][: len(left)] == [
            batch.rollout_index for batch in left
        ]


def test_an_iterator_that_nobody_reads_changes_nothing():
    dealt = loader()
    state = dealt.state_dict()
    iter(dealt)
    assert dealt.state_dict() == state
    next(iter(dealt))
    assert dealt.state_dict() == {**state, "position": 4}


def test_a_position_at_the_end_of_an_epoch_begins_the_next():
    dealt = loader()
    dealt.load_state_dict({**dealt.state_dict(), "position": 8})
    assert (dealt.epoch, dealt.rollout) == (1, 0)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"fingerprint": "g"},
            "prompts whose fingerprint is f, now it is g; restore it, or set data.allow_changed",
        ),
        ({"n": 12}, "a dataset whose number of prompts is 11, now it is 12"),
        ({"seed": 4}, "data.seed 3, now it is 4"),
        ({"shuffle": False}, "data.shuffle True, now it is False"),
        ({"prompts_per_rollout": 2}, "data.prompts_per_rollout 4, now it is 2"),
    ],
)
def test_a_position_in_another_order_is_refused_unless_allowed(changed, says):
    original = loader()
    next(iter(original))
    with pytest.raises(ConfigError, match=says):
        loader(**changed).load_state_dict(original.state_dict())
    allowed = loader(**changed, allow_changed_data=True)
    allowed.load_state_dict(original.state_dict())
    assert allowed.state_dict()["position"] == 4


def test_parts_may_change_between_rollouts_only():
    original = loader(micro_batches=2)
    batches = iter(original)
    next(batches)
    amid = original.state_dict()
    next(batches)
    loader(micro_batches=4).load_state_dict(original.state_dict())
    with pytest.raises(ConfigError, match=r"amid a rollout with micro-batches per rollout .* 2, now it is 4"):
        loader(micro_batches=4, allow_changed_data=True).load_state_dict(amid)


def test_a_position_of_another_version_is_refused():
    with pytest.raises(ConfigError, match="has version None, this release reads 1"):
        loader().load_state_dict({"epoch": 1})


@pytest.mark.parametrize(
    ("n", "size", "world"), [(10, 4, 1), (10, 4, 2), (9, 4, 2), (9, 4, 4), (7, 5, 2), (1, 3, 2)]
)
def test_evaluation_sees_every_prompt_once_on_all_ranks_together(n, size, world):
    ranks = [
        list(EvalPromptLoader(prompts(n), batch_size=size, rank=r, world_size=world)) for r in range(world)
    ]
    assert {len(rank) for rank in ranks} == {-(-n // size)}
    together = [[uid for batch in number for uid in batch.uids] for number in zip(*ranks, strict=True)]
    assert [uid for batch in together for uid in batch] == list(range(n))
    assert all(len(batch) == size for batch in together[:-1])
    with pytest.raises(ConfigError, match="validation_batch_size is 0"):
        EvalPromptLoader(prompts(n), batch_size=0)


# Streams.


def stream(rows=None, shards=1, **options):
    from datasets import Dataset

    rows = [{"prompt": f"p{i}", "answer": i} for i in range(10)] if rows is None else rows
    encoder = Encoder(tokenizer=TOKENIZER, form=PromptFormat(), max_prompt_tokens=4, overlong="drop")
    dataset = Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)
    return PromptStream(dataset, encoder, **{"length": 6, "buffer_size": 4, **options})


def streaming(micro_batches=1, **options):
    return StreamingPromptLoader(
        stream(**options), prompts_per_rollout=3, micro_batches=micro_batches, shuffle=True
    )


def test_a_stream_gives_every_row_once_a_pass_in_an_order_of_its_own():
    first, second = (stream(), stream())
    uids = [item.uid for item in first.take(30)]
    assert [sorted(uids[start : start + 10]) for start in (0, 10, 20)] == [
        list(range(start, start + 10)) for start in (0, 10, 20)
    ]
    assert uids != sorted(uids)
    assert [item.uid for item in second.take(30)] == uids
    assert [item.uid for item in stream(shuffle=False).take(30)] == list(range(30))


@pytest.mark.parametrize(
    ("micro_batches", "options"),
    [(1, {}), (2, {}), (2, {"shuffle": False}), (1, {"buffer_size": 100}), (2, {"shards": 5})],
)
def test_a_stream_resumes_exactly_from_every_position(micro_batches, options):
    original = streaming(micro_batches, **options)
    states, batches = [original.state_dict()], []
    for _ in range(4):
        for batch in original:
            batches.append((batch.micro_batch, batch.uids, batch.columns["answer"]))
            states.append(saved(original.state_dict()))
    for index, state in enumerate(states):
        resumed = streaming(micro_batches, **options)
        resumed.load_state_dict(state)
        again = [
            (batch.micro_batch, batch.uids, batch.columns["answer"]) for _ in range(4) for batch in resumed
        ]
        left = batches[index:]
        assert again[: len(left)] == left


def test_shards_come_in_another_order_in_each_pass_if_shuffled():
    shuffled = stream(shards=10, buffer_size=1)
    first, second = ([item.prompt for item in shuffled.take(10)] for _ in range(2))
    assert sorted(first) == sorted(second) != first
    assert first != second
    plain = stream(shards=10, shuffle=False)
    assert [item.prompt for item in plain.take(20)] == [f"p{i}" for i in range(10)] * 2


def test_a_position_stays_with_the_stream_that_loaded_it():
    dataset = stream().dataset

    def fresh():
        return PromptStream(dataset, stream().encoder, length=6, buffer_size=4, shuffle=False)

    first, resumed = fresh(), fresh()
    first.take(5)
    resumed.load_state_dict(first.state_dict())
    assert [item.prompt for item in resumed.take(2)] == ["p5", "p6"]
    assert [item.prompt for item in fresh().take(2)] == ["p0", "p1"]


def test_ranks_of_a_stream_share_each_block():
    ranks = [
        StreamingPromptLoader(stream(), prompts_per_rollout=4, rank=rank, world_size=2) for rank in range(2)
    ]
    whole = StreamingPromptLoader(stream(), prompts_per_rollout=4)
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert batch.uids == first.uids + second.uids


def test_a_stream_skips_overlong_prompts_and_refuses_to_search_for_ever():
    rows = [{"prompt": "short" if i % 2 else "tiny"} for i in range(6)]
    some = stream(rows)
    assert {item.prompt for item in some.take(5)} == {"tiny"}
    assert some.num_dropped > 0
    with pytest.raises(
        DataError, match=r"dataset gives no prompt \(\d+ were longer than data.max_prompt_tokens\)"
    ):
        stream(rows[1::2]).take(1)
    with pytest.raises(DataError, match="dataset, streamed row 0: the prompt is null"):
        stream([{"prompt": None}]).take(1)
