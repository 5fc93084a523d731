"""The tiny world: Chinese two-person dialogues and clips of drawn faces, made from a seed.

It is built so that each part of the method has something to do, and so that the best accuracy is known:

- A speaker's emotion shows in the words of about half the turns (tag `text_shows`); in the others it is in the face
  alone (`text_hides`). The face always shows it.
- The emotion of a reply is a function of the emotion it answers and of the relation named in the background (`RULES`),
  but for a share `NOISE` of replies whose emotion is drawn among the other six. So 1 - NOISE is the ceiling.
- A reply opens with a turn of speech that depends on the emotion it answers. Which one is a habit of the world
  (`Habits`), so a demonstration that answers a like emotion shows it. Topics are independent of emotions.
- A third of the wordings of each emotion never occur in train, and are as frequent as the others in valid and test.

The text of the stand-in checkpoints comes from other dialogues (`pretraining`): other shows, each with habits of its
own, all wordings, no dialogue of the world itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from elmd.labels import EMOTIONS, Emotion
from elmd.log import progress
from elmd.tiny.faces import Actor, geometry, write_clip
from elmd.types import SPLITS, Dialogue, Split, Utterance

NOISE = 0.08  # enough that a ceiling of 1 would betray a leak, little enough to learn from 1 200 samples
HIDING = 0.5  # of 660 test samples more than 300 then hide the emotion from the text, which one claim needs
LENGTHS = (2, 2, 3, 3, 4)  # turns of a dialogue, equally likely; short, or the history would tell every emotion
SHOWS: dict[Split, int] = {"train": 6, "valid": 2, "test": 2}

H, SU, SA, D, A, F, N = EMOTIONS
#: Reply emotion by relation, for the emotions in the order of `EMOTIONS` (Happy Surprise Sad Disgust Anger Fear
#: Neutral). No relation alone makes one reply emotion likelier than two in seven, nor does a user's emotion alone.
RULES: dict[str, tuple[Emotion, ...]] = {
    "friends": (H, SU, SA, D, A, F, N),
    "rivals": (D, H, H, A, A, N, D),
    "family": (H, F, F, SA, SA, SU, N),
    "strangers": (SU, N, SA, N, F, SU, H),
}
RELATIONS = {
    "friends": ("好朋友", "知己", "老同学", "铁哥们"),
    "rivals": ("死对头", "竞争对手", "冤家", "情敌"),
    "family": ("一家人", "母女", "姐弟", "夫妻"),
    "strangers": ("陌生人", "萍水相逢的路人", "初次见面的旅客", "互不相识的邻座"),
}

#: Wordings of each emotion; the last third never occur in train.
WORDINGS: dict[Emotion, tuple[str, ...]] = {
    H: (
        "我太开心了", "心里美滋滋的", "真让人欢喜", "我乐坏了", "简直像过年一样", "我高兴得想唱歌", "笑得合不拢嘴",
        "真是太棒了", "我开心得想跳舞", "心里乐开了花", "真是让人高兴坏了", "我欢喜得像个孩子",
    ),
    SU: (
        "我简直不敢相信", "怎么会这样", "太出乎意料了", "这也太突然了", "我完全没想到", "居然有这种事", "真的假的",
        "我都愣住了", "真是让人不敢相信", "怎么会突然这样", "我愣得说不出话", "没想到居然是真的",
    ),
    SA: (
        "我难过得吃不下饭", "心里空落落的", "真想大哭一场", "我伤心透了", "鼻子一酸", "眼泪止不住", "心都碎了",
        "我提不起劲来", "心里难过得很", "我伤心得直掉眼泪", "真让人心碎", "想起来就想哭",
    ),
    D: (
        "真叫人恶心", "我看着就反胃", "太讨厌了", "让人倒胃口", "我受不了这股味", "我嫌弃得很", "看一眼都嫌脏",
        "脏得没法看", "真是又脏又讨厌", "恶心得我反胃", "我嫌它倒胃口", "实在让人嫌弃",
    ),
    A: (
        "气死我了", "我火冒三丈", "太过分了", "简直欺人太甚", "我忍不下这口气", "凭什么这样对我", "肺都气炸了",
        "别再惹我", "我气得冒火", "真是过分透顶", "这口气我咽不下", "凭什么惹我生气",
    ),
    F: (
        "我好害怕", "吓得腿都软了", "我心里直发毛", "浑身发抖", "我不敢想下去", "手心全是冷汗", "真怕出事",
        "我慌得不行", "我怕得发抖", "吓得我直冒冷汗", "心里又慌又怕", "我慌得腿软",
    ),
    N: (
        "没什么特别的", "我知道了", "情况就是这样", "一切照旧", "说一声而已", "就这么定了", "我随口一提", "也就那样",
        "情况照旧", "没什么好说的", "我就说一声", "事情就这样定了",
    ),
}  # fmt: skip

#: Ways to open a reply; none says anything by itself.
OPENERS = (
    "听你这么一讲", "照我看啊", "话说回来", "跟你说句实话", "你先听我说", "说到底", "依我之见", "不瞒你说",
    "换句话讲", "怎么说呢", "老实讲", "这么说吧", "我琢磨着", "讲真的", "我寻思了一下", "仔细想想", "要我说呀",
    "你别说", "说来也是", "这话在理", "哎我跟你讲", "其实吧", "我早就想说", "凭良心讲", "听我一句", "你看啊",
    "说句心里话", "倒也是",
)  # fmt: skip
HABITS = 1  # openers per emotion in one world; with more, a demonstration would tell the right one by chance only

#: What people talk about: subjects and predicates of each topic, any pair of which makes a clause.
TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "搬家": (("新房子", "搬家公司", "出租屋", "旧家具"), ("明天就要收拾", "已经联系好了", "还没打包完", "要换个地方")),
    "考试": (("期末考", "数学卷子", "补习班", "准考证"), ("下周才出成绩", "复习了一半", "已经交上去了", "老师刚讲过")),
    "做饭": (("那锅红烧肉", "厨房", "炖汤", "这道菜"), ("还在火上", "放了两勺盐", "要再煮十分钟", "快端上桌了")),
    "旅行": (("去海边的车票", "旅行团", "民宿", "行李箱"), ("订在周末", "改到下个月", "刚刚确认", "就等出发")),
    "看病": (("医院的检查", "这盒药", "大夫", "体检报告"), ("今天上午拿到", "让我按时吃", "约在三点", "写得很清楚")),
    "工作": (("那份合同", "部门经理", "项目汇报", "办公室"), ("周五要交", "开会时提到", "改了第三遍", "通知全组加班")),
    "养猫": (("小花猫", "猫粮", "隔壁的猫", "猫窝"), ("在阳台上", "打翻在地", "早上才换", "跑进院子")),
    "看球": (("昨晚的球赛", "主队", "那个前锋", "裁判"), ("踢到加时", "换了阵型", "罚了点球", "零比零收场")),
    "天气": (("这场雨", "台风", "外面的雪", "气温"), ("下到半夜", "后天登陆", "积了一尺厚", "降了十度")),
    "婚礼": (("表姐的婚礼", "请柬", "婚纱", "喜糖"), ("定在国庆", "寄到家里", "试了三套", "装满一篮")),
    "手机": (("新手机", "充电器", "那个软件", "手机屏幕"), ("摔在地上", "更新到一半", "从网上下单", "电量只剩一格")),
    "种花": (("阳台的兰花", "玫瑰苗", "花盆", "那棵桂树"), ("浇过水了", "长出新芽", "搬到窗边", "开了满枝")),
}  # fmt: skip
BACKGROUNDS = ("{a}和{b}是{relation}，正在聊{topic}。", "{a}跟{b}是{relation}，说起了{topic}。")
NAMES = (
    "林晓", "周航", "陈静", "王磊", "赵敏", "孙浩", "李娜", "吴迪", "郑爽", "冯远", "何洁", "许强", "沈月", "韩雪",
    "杨帆", "朱丹", "秦岚", "罗飞", "高圆", "马超",
)  # fmt: skip

SHOWS_TAG, HIDES_TAG = "text_shows", "text_hides"
_EPISODES = 20  # dialogues of a show in the pretraining text


@dataclass(frozen=True)
class Habits:
    """Which openers answer which emotion: the wording that replies to like emotions share."""

    openers: dict[Emotion, tuple[str, ...]]

    @classmethod
    def drawn(cls, draw: Random) -> Habits:
        pool = draw.sample(OPENERS, HABITS * len(EMOTIONS))
        return cls({e: tuple(pool[HABITS * i : HABITS * (i + 1)]) for i, e in enumerate(EMOTIONS)})


def dialogue(
    draw: Random,
    id_: str,
    show: str,
    split: Split | None,
    turns: int,
    wordings: dict[Emotion, Sequence[str]],
    habits: Habits,
) -> Dialogue:
    """One dialogue of the world's rules, without clips."""
    relation, topic = draw.choice(list(RULES)), draw.choice(list(TOPICS))
    names = draw.sample(NAMES, 2)
    emotion = draw.choice(EMOTIONS)
    utterances: list[Utterance] = []
    for turn in range(turns):
        opener = ""
        if turn:
            answered = emotion
            emotion = RULES[relation][EMOTIONS.index(answered)]
            if draw.random() < NOISE:
                emotion = draw.choice([e for e in EMOTIONS if e is not emotion])
            opener = draw.choice(habits.openers[answered]) + "，"
        hides = draw.random() < HIDING
        subjects, predicates = TOPICS[topic]
        clause = draw.choice(subjects) + draw.choice(predicates)
        parts = [clause] if hides else [draw.choice(wordings[emotion]), clause]
        if not turn and not hides and draw.random() < 0.5:
            parts.reverse()
        utterances.append(
            Utterance(
                id=f"{id_}_{turn + 1}",
                speaker=names[turn % 2],
                text=opener + "，".join(parts) + "。",
                emotion=emotion,
                tags=(HIDES_TAG if hides else SHOWS_TAG,),
            )
        )
    background = draw.choice(BACKGROUNDS).format(
        a=names[0], b=names[1], relation=draw.choice(RELATIONS[relation]), topic=topic
    )
    return Dialogue(id_, show, tuple(utterances), background, split)


def topic_of(text: str) -> str:
    """The topic that a text of the world is about; it names one of the topic's subjects.

    Raises:
        StopIteration: the text is not of the world.
    """
    return next(topic for topic, (subjects, _) in TOPICS.items() if any(subject in text for subject in subjects))


def dialogues(seed: int, sizes: dict[Split, int]) -> list[Dialogue]:
    """The world's dialogues with exactly `sizes` adjacent pairs per split; no show is in two splits."""
    habits = Habits.drawn(Random(f"habits-{seed}"))
    seen: dict[Emotion, Sequence[str]] = {e: words[: 2 * len(words) // 3] for e, words in WORDINGS.items()}
    made = []
    for split in SPLITS:
        draw, pairs, number = Random(f"{split}-{seed}"), 0, 0
        while pairs < sizes[split]:
            turns = min(draw.choice(LENGTHS), sizes[split] - pairs + 1)
            show = f"{split}-show-{number % SHOWS[split] + 1}"
            words: dict[Emotion, Sequence[str]] = seen if split == "train" else dict(WORDINGS)
            made.append(dialogue(draw, f"{split}-{number + 1:04d}", show, split, turns, words, habits))
            pairs, number = pairs + turns - 1, number + 1
    return made


def pretraining(seed: int, count: int) -> Iterator[Dialogue]:
    """`count` dialogues for the stand-ins, `_EPISODES` a show; each show has habits of its own.

    Seeded apart from `dialogues`: only the lists of words and the rules are shared.
    """
    for number in range(count):
        show, draw = number // _EPISODES, Random(f"pretraining-{seed}-{number}")
        habits = Habits.drawn(Random(f"pretraining-habits-{seed}-{show}"))
        id_ = f"pretraining-{number + 1:05d}"
        yield dialogue(draw, id_, f"pretraining-show-{show + 1}", None, draw.choice(LENGTHS), dict(WORDINGS), habits)


def write_world(folder: Path, seed: int, sizes: dict[Split, int]) -> dict[str, Any]:
    """Write `dialogues.jsonl`, `clips/` and `world.json` into `folder`; equal seeds give equal bytes.

    A clip exists for each turn that somebody answers. Clips that are there already (of a killed run) are kept.

    Returns:
        what `world.json` holds: sizes, rules, what is known about the best possible scores.
    """
    made = dialogues(seed, sizes)
    clips = folder / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    lines = []
    for talk in progress(made, "world", unit="dialogue"):
        cast = {name: Actor(Random(f"{seed}-{talk.id}-{name}")) for name in {u.speaker for u in talk.utterances}}
        records = []
        for utterance in talk.utterances:
            record: dict[str, Any] = {
                "id": utterance.id,
                "speaker": utterance.speaker,
                "text": utterance.text,
                "emotion": utterance.emotion.value,
                "tags": list(utterance.tags),
            }
            if utterance is not talk.utterances[-1]:
                record["clip"] = f"clips/{utterance.id}.mp4"
                path = folder / record["clip"]
                if not path.is_file():
                    draw = Random(f"{seed}-{utterance.id}")
                    partial = path.with_suffix(".partial")
                    write_clip(cast[utterance.speaker].act(geometry(utterance.emotion, draw), draw), partial)
                    partial.replace(path)
            records.append(record)
        lines.append(
            {
                "id": talk.id,
                "show": talk.show,
                "split": talk.split,
                "background": talk.background,
                "utterances": records,
            }
        )
    facts = describe_world(seed, made)
    (folder / "dialogues.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    (folder / "world.json").write_text(json.dumps(facts, ensure_ascii=False, indent=2), encoding="utf-8")
    return facts


def describe_world(seed: int, made: Iterable[Dialogue]) -> dict[str, Any]:
    """The world's rules, its sizes, and the best possible accuracies of the reply emotion.

    `ceiling` knows the emotion that is answered and the relation; `relation_only` knows the relation, where the emotion
    that is answered is equally likely to be any (the first turn of a dialogue).
    """
    samples: Counter[str] = Counter()
    hiding: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for talk in made:
        split = str(talk.split)
        count[split] += 1
        samples[split] += len(talk.utterances) - 1
        hiding[split] += sum(HIDES_TAG in u.tags for u in talk.utterances[:-1])
    best = []
    for rule in RULES.values():
        share = {e: sum((1 - NOISE) if r is e else NOISE / 6 for r in rule) / len(rule) for e in EMOTIONS}
        best.append(max(share.values()))
    return {
        "seed": seed,
        "dialogues": dict(count),
        "samples": dict(samples),
        "samples_whose_text_hides_the_emotion": dict(hiding),
        "reply_emotion": {
            "rules": {name: dict(zip(EMOTIONS, rule, strict=True)) for name, rule in RULES.items()},
            "noise": NOISE,
            "ceiling": 1 - NOISE,
            "relation_only": sum(best) / len(best),
        },
        "openers": {e: list(words) for e, words in Habits.drawn(Random(f"habits-{seed}")).openers.items()},
        "wordings": {
            "in_every_split": {e: list(words[: 2 * len(words) // 3]) for e, words in WORDINGS.items()},
            "in_valid_and_test_only": {e: list(words[2 * len(words) // 3 :]) for e, words in WORDINGS.items()},
        },
    }
