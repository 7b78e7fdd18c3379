"""Every measure against a count by hand; the preset keeps good text in Chinese and English, and drops bad text."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from llmkit.config import UserError, dump, validate
from llmkit.data import filters, grams
from llmkit.data.config import CleanConfig, DataConfig
from llmkit.data.dedup import REASONS
from llmkit.data.filters import MEASURES, Cleaner, View

DEMO = Path(__file__).parents[2] / "data/demo/corpus.jsonl"

# --- text as arrays ---------------------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from("ab1中文あกé，。 \n-_\U00020000"), max_size=40)
SINGLES = "\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e01-\u0eff\U00020000-\U0003ffff"


def units(text: str) -> list[str]:
    """An independent way to find them: a regular expression."""
    return re.findall(f"[{SINGLES}]|[^\\W_{SINGLES}]+", text)


def hashes(text: str) -> list[int]:
    points = grams.points_of(text)
    kinds = grams.kinds_of(points)
    return grams.unit_hashes(points, kinds, grams.unit_starts(kinds)).tolist()


@given(a=TEXT, b=TEXT)
@settings(max_examples=300, deadline=None)
def test_units_are_words_or_single_characters(a: str, b: str) -> None:
    """Two units have the same hash exactly if they are the same, wherever they stand."""
    names = units(a) + units(b)
    numbers = hashes(a) + hashes(b)
    assert len(names) == len(numbers)
    assert len(set(names)) == len(set(numbers)) == len(set(zip(names, numbers, strict=True)))


@given(text=TEXT, n=st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_grams_are_runs_of_units(text: str, n: int) -> None:
    """Also in their number: of a text that is too short, the whole is one."""
    names = units(text)
    runs = [tuple(names[i : i + n]) for i in range(max(1, len(names) - n + 1))] if names else []
    numbers = grams.grams_of(grams.points_of(text), n).tolist()
    assert len(runs) == len(numbers) and len(set(runs)) == len(set(zip(runs, numbers, strict=True)))
    assert len(set(runs)) == len(set(numbers))


def test_words_of_any_script_are_letters() -> None:
    """Vowel signs too, without which Hindi and Arabic would look like half symbols."""
    for text in ("नमस्ते", "السلام", "สวัสดี", "Grüße", "中文〇", "ខ្មែរ"):
        assert filters.letters(View(text)) == 1.0, text


# --- measures ---------------------------------------------------------------------------------------------------------

MEASURED: dict[str, list[tuple[str, float]]] = {
    "chars": [("", 0), ("中文ab", 4)],
    "letters": [("", 0), ("ab 12", 1), ("中，文。", 0.5), ("a - -", 1 / 3), ("！？…", 0)],
    "control_chars": [("a\tb\nc\r\n", 0), ("a\x00b\x1b", 0.5), ("\x7f", 1), ("a\u200bb", 0)],
    "replacement_chars": [("ab", 0), ("a\ufffd中\ufffd", 0.5)],
    "mojibake": [
        ("中文".encode().decode("latin-1"), 1),  # six characters, each of three a letter as it was
        ("é".encode().decode("cp1252") + "abcdef", 0.25),
        ("Ça va, élève? Über uns: Straße, voilà; 3 °C “naïve”", 0),
        ("，。的".encode().decode("gbk", "replace"), 0.2),
        ("锟斤拷两公斤", 0.5),
    ],
    "repeated_lines": [("a\nb\na\n\n a \nb", 0.6), ("a\na\na", 0), ("", 0)],
    "repeated_line_chars": [("abcd\nxy\nabcd\n", 0.4), ("abcd\n", 0)],
    "repeated_paragraphs": [("a\nb\n\nc\n\n a\nb\n\n\n d", 0.25), ("a", 0)],
    "bullet_lines": [("- a\n* b\n• c\nd", 0.75), ("一、苹果\n（2）梨\n1. fig", 0), ("·苹果\n●梨", 1)],
    "ellipsis_lines": [("这样……\n那样…\nso...\nend.", 0.75), ("", 0)],
    "symbols": [("#a #b c d", 0.5), ("我说……你听", 0.25), ("a.b...c", 1 / 3), ("C# is fine", 1 / 3)],
    "repeated_grams": [("a b c", 0), (" ".join(map(str, range(99))), 0)],
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures(name: str) -> None:
    for text, expected in MEASURED[name]:
        assert MEASURES[name](View(text)) == pytest.approx(expected), text


@given(
    text=st.lists(st.integers(0, 5), max_size=60),
    chinese=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_repeated_grams_as_defined(text: list[int], chinese: bool) -> None:
    """Share of units within a run of 10 words, or 20 characters, that stood before: counted naively."""
    n = 20 if chinese else 10
    # A short alphabet, and a copy of the beginning, so that long runs do return.
    text = text + text[: len(text) // 2 + 5]
    covered: set[int] = set()
    seen = set()
    for i in range(len(text) - n + 1):
        run = tuple(text[i : i + n])
        if run in seen:
            covered.update(range(i, i + n))
        seen.add(run)
    units_of_text = ("" if chinese else " ").join(("子丑寅卯辰巳" if chinese else "abcdef")[i] for i in text)
    assert filters.repeated_grams(View(units_of_text)) == pytest.approx(len(covered) / max(1, len(text)))


# --- the preset -------------------------------------------------------------------------------------------------------

POEMS = [
    "静夜思\n李白\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "桃之夭夭，灼灼其华。之子于归，宜其室家。\n桃之夭夭，有蕡其实。之子于归，宜其家室。\n桃之夭夭，其叶蓁蓁。之子于归，宜其家人。",
    "蒹葭苍苍，白露为霜。所谓伊人，在水一方。\n溯洄从之，道阻且长。溯游从之，宛在水中央。\n"
    "蒹葭萋萋，白露未晞。所谓伊人，在水之湄。\n溯洄从之，道阻且跻。溯游从之，宛在水中坻。",
    "采采芣苢，薄言采之。采采芣苢，薄言有之。\n采采芣苢，薄言掇之。采采芣苢，薄言捋之。\n采采芣苢，薄言袺之。采采芣苢，薄言襭之。",
    "坎坎伐檀兮，置之河之干兮，河水清且涟猗。不稼不穑，胡取禾三百廛兮？不狩不猎，胡瞻尔庭有县貆兮？彼君子兮，不素餐兮！\n"
    "坎坎伐辐兮，置之河之侧兮，河水清且直猗。不稼不穑，胡取禾三百亿兮？不狩不猎，胡瞻尔庭有县特兮？彼君子兮，不素食兮！",
    "昔我往矣，杨柳依依。今我来思，雨雪霏霏。行道迟迟，载渴载饥。我心伤悲，莫知我哀！",
]
OTHERS = [
    "本报讯（记者 王明）3月15日上午，市交通局召开新闻发布会，通报地铁三号线二期工程进展情况。该线路全长18.6公里，设站14座。",
    "一季度，全市完成生产总值1,234.5亿元，同比增长5.3%。其中，第一产业增长3.3%，第二产业增长6.0%，第三产业增长5.0%。",
    "“你怎么来了？”他问。\n“我……我来看看你。”她低下头，声音很轻。\n“路上冷吗？”\n“不冷。”",
    "在 Python 中，可以用 `for i in range(10):` 来循环：\n\n```python\nfor i in range(10):\n    print(i)  # 数字\n```",
    "安装依赖：pip install numpy==1.26.4，然后运行 python train.py --lr 3e-4。若显存不足，请把 batch_size 从 64 调到 32。",
    "购物清单：\n一、苹果三斤；\n二、牛奶两盒；\n三、鸡蛋一打；\n四、面包（全麦）两个；\n五、洗衣液一瓶。",
    "注意事项：\n（１）请提前１５分钟到场；\n（２）请携带身份证件；\n（３）会场内禁止吸烟；\n（４）请将手机调至静音。",
    "所需材料：\n● 面粉300克\n● 鸡蛋2个\n● 白糖50克\n做法：把所有材料混合，揉成光滑的面团，发酵一小时后上锅蒸二十分钟。",
    "第一章　总则\n第一条　为了加强管理，制定本办法。\n第二条　本办法适用于本市。\n第三条　有关部门负责监督管理工作。",
    "繁體中文也要保留：臺北的天氣很好，我們下午去圖書館看書，晚上再去夜市吃東西。",
    "孔子曰：學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？人不知而不慍，不亦君子乎？",
    "答：x² + 2x + 1 = 0 的解是 x = −1。因为 (x + 1)² = 0，所以只有一个解，重数为二。",
]


def prose(rng: random.Random) -> str:
    """Made-up sentences, a few hundred characters."""
    who = ["老张", "小梅", "邻居家的孩子", "图书馆的管理员", "那位医生", "我", "两个学生", "渔夫"]
    when = ["清晨", "下班以后", "去年冬天", "每逢周末", "雨停了", "太阳落山时"]
    where = ["在河边", "在老街的茶馆里", "在学校后面的小山上", "在海边的村子里", "在火车站", "在厨房"]
    what = ["遇见了多年不见的朋友", "把丢了的钥匙找了回来", "听见远处传来笛声", "想起了小时候的事", "做了一锅热汤"]
    end = ["心里很高兴", "不知道该说什么", "于是慢慢走回家去", "第二天就写了一封信", "谁也没有再提这件事"]
    n = rng.randint(2, 5)
    return "".join(
        f"{rng.choice(when)}，{rng.choice(who)}{rng.choice(where)}{one}，{other}{rng.choice('。！')}"
        for one, other in zip(rng.sample(what, n), rng.sample(end, n), strict=True)
    )


PRESET = Cleaner(validate(CleanConfig, {"preset": "default"}))


def test_good_chinese_survives() -> None:
    """All demo documents in Chinese, made-up prose, classical poems, news, code among Chinese, lists: 99 % and more."""
    demo = [json.loads(line) for line in DEMO.read_text("utf-8").splitlines()]
    chinese = [d["text"] for d in demo if d["lang"] == "zh"]
    rng = random.Random(1)
    for good in (chinese, [prose(rng) for _ in range(1000)], POEMS, OTHERS):
        broken = [(PRESET.broken_rule(PRESET.edit(t)), t) for t in good]
        lost = [b for b in broken if b[0]]
        assert len(lost) <= 0.01 * len(good), lost[:3]
    assert len(chinese) > 2000


def test_good_english_survives() -> None:
    demo = [json.loads(line) for line in DEMO.read_text("utf-8").splitlines()]
    english = [d["text"] for d in demo if d["lang"] == "en"]
    assert sum(PRESET.broken_rule(t) is not None for t in english) <= 0.01 * len(english)


SENTENCE = "中文编码错误的例子，这里有一段文字，谁也看不懂。"
BAD = {
    "slogan": ("买一送一，全场包邮，点击购买！" * 20, "max_repeated_grams"),
    "seo": ("buy cheap shoes online best price today free shipping now " * 12, "max_repeated_grams"),
    "menu": ("欢迎光临本店\n" * 10 + "谢谢惠顾，下次再来", "max_repeated_lines"),
    "chorus": ("\n\n".join(["啦啦啦，我们走在大路上，意气风发斗志昂扬"] * 3), "max_repeated_line_chars"),
    "symbols": ("@#¥%……&*（）——+|}{“：？》《~！" * 3, "min_letters"),
    "table": ("|---|---|---|\n| : | : | : |\n" * 2 + "|-----|----|", "min_letters"),
    "latin-1": (SENTENCE.encode().decode("latin-1"), "max_mojibake"),
    "gbk": (SENTENCE.encode().decode("gbk", "replace"), "max_mojibake"),
    "cp1252": ("It’s a “quoted” text, isn’t it? That’s how it’s broken.".encode().decode("cp1252", "replace"), "max_mojibake"),
    "lost": ("这是一段有问题的文字\ufffd\ufffd，看不清楚写了什么内容。", "max_replacement_chars"),
    "binary": ("ab\x00cd\x01ef" * 5, "max_control_chars"),
    "short": ("点击这里", "min_chars"),
    "link": ("看\nhttps://example.com/a-very-long-address/that-says-nothing.html", "min_chars"),
    "long": ("一个很长的文档。" * 200_000, "max_chars"),
    "teasers": ("今天天气不错…\n我们去公园吧…\n吃点什么好呢…\n明天再说吧…", "max_ellipsis_lines"),
    "bullets": ("\n".join(f"• 第{i}项内容" for i in range(20)), "max_bullet_lines"),
    "tags": ("#旅行 #美食 #摄影 #生活 #日常 #打卡 #周末 #快乐", "max_symbols"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_go(name: str) -> None:
    text, rule = BAD[name]
    assert PRESET.broken_rule(PRESET.edit(text)) == rule


def test_lines_that_are_addresses_go() -> None:
    text = "看这里：\n  https://a.example/b?c=d  \nWWW.x.cn\nhttps://a.example 是网址\n再见"
    assert PRESET.edit(text) == "看这里：\nhttps://a.example 是网址\n再见"
    assert Cleaner(CleanConfig(min_chars=1)).edit(text) == text
    assert PRESET.edit("a\r\nwww.b\r\nc\u2028d") == "a\r\nc\u2028d"


# --- in a recipe ------------------------------------------------------------------------------------------------------


def clean(value: object) -> CleanConfig:
    config: DataConfig = validate(DataConfig, {"path": "a", "clean": value})
    assert validate(DataConfig, {"path": "a", "clean": json.loads(config.clean.model_dump_json())}) == config
    return config.clean


def test_recipes_of_rules() -> None:
    assert not clean({}).is_on and not CleanConfig().is_on
    preset = clean("default")
    assert preset == clean({"preset": "default"}) and preset.is_on
    assert all(v is not None for v in preset.rules.values()), "a rule without a default"
    mine = clean({"preset": "default", "min_chars": None, "min_letters": 0.9})
    assert (mine.min_chars, mine.min_letters, mine.max_symbols) == (None, 0.9, preset.max_symbols)
    assert clean({"min_chars": 5}).rules == {**CleanConfig().rules, "min_chars": 5}
    with pytest.raises(UserError, match=r"clean\.preset: expected 'default'"):
        clean("defalt")
    with pytest.raises(UserError, match="unknown key - did you mean 'min_chars'"):
        clean({"min_char": 5})
    assert "preset: default" in dump(preset)


def test_every_rule_has_a_measure_and_a_reason() -> None:
    """F3: no rule of the recipe is read and then forgotten."""
    rules = set(CleanConfig().rules) - {"drop_url_lines"}
    assert rules <= {f"{side}_{name}" for name in MEASURES for side in ("min", "max")}
    assert rules <= set(REASONS) and len(REASONS) < 255
    for rule in rules:
        value = 10**9 if rule == "min_chars" else 1 if rule.startswith("min") or rule == "max_chars" else 0
        text = "a\n\na\n\n#中\ufffd\x00Ã©\n- b…\n" * 20 + " ".join("x" * 30)
        assert Cleaner(CleanConfig(**{rule: value})).broken_rule(text) == rule
        assert Cleaner(CleanConfig()).broken_rule(text) is None
