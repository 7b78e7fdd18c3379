"""Plots and reading passages, as templates: what happens in the valley when it happens in more than one sentence.

Slots as in templates.py; {p} is the place of the event and {q} another one, {v} a village, {f} a food, {w} a pet.
A story takes one opening, one sentence of every beat of a plot, and one ending; its summary names who, what and where.
"""

OPENINGS = {
    "en": [
        "On a windy {d} in {v}, {h} had a plan.",
        "It was {d}, and {h} the {job} got up early.",
        "One morning {h} from {hv} came to {v}.",
        "The sun was low over {v} when {h} set out.",
        "Rain fell on {v} all {d}, but {h} did not mind.",
        "“What a day,” said {h}, looking out at {v}.",
        "Last {d} something odd happened to {h}.",
        "In {v} people still tell this story about {h}.",
        "One summer evening {h} took a walk in {v}.",
        "It was winter in {v}, and {h} was bored.",
    ],
    "zh": [
        "{d}，{v}刮着风，{h}有了一个主意。",
        "那天是{d}，{job}{h}起得很早。",
        "一天早上，{hv}的{h}来到{v}。",
        "太阳刚照到{v}，{h}就出门了。",
        "{d}，{v}下了一整天雨，可是{h}不在乎。",
        "「多好的日子啊。」{h}望着{v}说。",
        "上个{d}，{h}遇到一件怪事。",
        "在{v}，人们还在讲{h}的这个故事。",
        "夏天的一个傍晚，{h}在{v}散步。",
        "冬天到了，{v}的{h}闲得发慌。",
    ],
}
ENDINGS = {
    "en": [
        "Then they shared {f} and laughed.",
        "“Thank you, {k},” said {h}.",
        "That night {h} slept well.",
        "Since then {h} and {k} have been friends.",
        "{k} went home humming a tune.",
        "Even {w} looked pleased.",
        "And {h} ate {f} until {he} could eat no more.",
        "The whole of {v} heard about it by supper.",
    ],
    "zh": [
        "后来他们一起吃{f}，笑得很开心。",
        "「谢谢你，{k}。」{h}说。",
        "那天晚上，{h}睡得很香。",
        "从此{h}和{k}成了朋友。",
        "{k}哼着小曲回家了。",
        "连{w}也显得很高兴。",
        "{h}吃{f}吃到再也吃不下。",
        "晚饭时，整个{v}都知道了这件事。",
    ],
}
# plot -> language -> (beats, summary). The summary repeats words of the story, so that it can be learnt by reading.
PLOTS = {
    "lost": {
        "en": (
            [
                [
                    "{He} was carrying {thing} and put it down to rest.",
                    "{He} had {thing} under {his} arm.",
                    "{His} pride was {thing}, bought last year.",
                    "{He} wanted to show {thing} to a friend.",
                ],
                [
                    "But a moment later it was gone.",
                    "Then {w} ran past, and it vanished.",
                    "When {he} looked again, it was lost.",
                    "At noon {he} saw that it was missing.",
                ],
                [
                    "{He} looked {q}, and found only an old shoe.",
                    "{He} asked everyone {q}, but nobody knew.",
                    "{He} searched {q} until {his} feet hurt.",
                ],
                [
                    "At last {k} found it {p}.",
                    "It was {k} who found it {p}.",
                    "Luckily {k} found it {p} and called out.",
                ],
            ],
            "{h} lost {thing}, and {k} found it {p}.",
        ),
        "zh": (
            [
                [
                    "{ta}拿着{thing}，放下来歇了歇。",
                    "{ta}胳膊下夹着{thing}。",
                    "{ta}最得意的是去年买的{thing}。",
                    "{ta}想让朋友看看{thing}。",
                ],
                [
                    "可是一转眼就不见了。",
                    "这时{w}跑过去，东西就没了。",
                    "再一看，已经丢了。",
                    "到了中午，{ta}才发现丢了。",
                ],
                ["{ta}到{q}找，只找到一只旧鞋。", "{ta}问遍了{q}的人，谁也不知道。", "{ta}在{q}找得脚都疼了。"],
                ["最后，{k}在{p}找到了。", "原来是{k}在{p}找到的。", "幸好{k}在{p}找到了，喊了一声。"],
            ],
            "{h}丢了{thing}，{k}在{p}找到了。",
        ),
    },
    "broken": {
        "en": (
            [
                [
                    "{He} tripped over {w} and broke {thing}.",
                    "A gust of wind broke {his} best treasure, {thing}.",
                    "{He} sat on {thing} by mistake, and it broke.",
                    "With a crack, {thing} broke in two.",
                ],
                [
                    "“Oh no,” {he} said, and almost cried.",
                    "{His} face grew long.",
                    "Nobody {q} could mend it.",
                    "{He} tried glue {q}, but it would not hold.",
                ],
                [
                    "{k} mended it {p} with string and patience.",
                    "Then {k} mended it {p} in an hour.",
                    "{k} sat down {p} and mended it, whistling.",
                ],
            ],
            "{h} broke {thing}, and {k} mended it {p}.",
        ),
        "zh": (
            [
                [
                    "{ta}被{w}绊了一下，弄坏了{thing}。",
                    "一阵大风弄坏了{ta}的宝贝：{thing}。",
                    "{ta}不小心坐上去，弄坏了{thing}。",
                    "咔的一声，{ta}弄坏了{thing}。",
                ],
                [
                    "「哎呀！」{ta}差点哭了。",
                    "{ta}的脸拉得老长。",
                    "{q}的人谁也修不好。",
                    "{ta}在{q}用胶水粘，可是粘不住。",
                ],
                ["{k}在{p}用绳子耐心地修好了。", "后来{k}在{p}花了一个钟头修好了。", "{k}坐在{p}，吹着口哨修好了。"],
            ],
            "{h}弄坏了{thing}，{k}在{p}修好了。",
        ),
    },
    "gift": {
        "en": (
            [
                [
                    "It was {k}'s birthday, and {h} had forgotten it.",
                    "{k} had been ill, and {h} was worried.",
                    "{h} wanted to thank {k} for the {f}.",
                    "{k} looked sad that day.",
                ],
                [
                    "{He} went {q} and thought hard.",
                    "{He} counted {his} coins twice.",
                    "{He} asked {w} for advice, and it said nothing.",
                    "{He} walked up and down {q}.",
                ],
                [
                    "Then {he} gave {k} {thing} {p}.",
                    "So {he} gave {k} {thing} {p}.",
                    "In the end {he} gave {k} {thing} {p}.",
                ],
                ["{k} jumped for joy.", "{k} could not say a word.", "“For me?” asked {k}."],
            ],
            "{h} gave {k} {thing} {p}.",
        ),
        "zh": (
            [
                [
                    "那天是{k}的生日，{h}却忘了。",
                    "{k}生过一场病，{h}很担心。",
                    "{h}想谢谢{k}送的{f}。",
                    "那天{k}看起来很难过。",
                ],
                [
                    "{ta}走到{q}，想了又想。",
                    "{ta}把硬币数了两遍。",
                    "{ta}向{w}请教，它什么也没说。",
                    "{ta}在{q}走来走去。",
                ],
                ["然后{ta}在{p}送给{k}{thing}。", "于是{ta}在{p}送给{k}{thing}。", "最后{ta}在{p}送给{k}{thing}。"],
                ["{k}高兴得跳了起来。", "{k}说不出话来。", "「给我的？」{k}问。"],
            ],
            "{h}在{p}送给{k}{thing}。",
        ),
    },
    "trade": {
        "en": (
            [
                [
                    "{He} was tired of eating {f}.",
                    "{He} had more {f} than {he} could carry.",
                    "{His} bag was full of {f}.",
                ],
                [
                    "{He} met {k} {p}, who owned {thing}.",
                    "There was {k} {p}, holding {thing}.",
                    "{k} stood {p} and was bored with {thing}.",
                ],
                [
                    "They looked at each other.",
                    "“Shall we?” asked {k}.",
                    "{w_cap} watched them closely.",
                    "It took one minute to agree.",
                ],
                [
                    "So {h} traded the {f} for {thing}.",
                    "In the end {h} traded the {f} for {thing}.",
                    "{h} happily traded the {f} for {thing}.",
                ],
            ],
            "{h} traded {f} with {k} for {thing} {p}.",
        ),
        "zh": (
            [
                ["{ta}吃{f}吃腻了。", "{ta}的{f}多得拿不动。", "{ta}的包里装满了{f}。"],
                [
                    "{ta}在{p}遇到{k}，{k}有{thing}。",
                    "{k}站在{p}，手里拿着{thing}。",
                    "{k}在{p}发呆，早就不想要{thing}了。",
                ],
                ["他们互相看了看。", "「换不换？」{k}问。", "{w}在旁边看着他们。", "一分钟就谈好了。"],
                ["于是{h}用{f}换来了{thing}。", "最后{h}用{f}换来了{thing}。", "{h}高高兴兴地用{f}换来了{thing}。"],
            ],
            "{h}在{p}用{f}和{k}换了{thing}。",
        ),
    },
    "rescue": {
        "en": (
            [
                [
                    "Suddenly {he} heard a cry {p}.",
                    "There was a noise {p}.",
                    "{His} neighbour said something was wrong {p}.",
                ],
                [
                    "{w_cap} was stuck there, deep in the mud.",
                    "There stood {w}, stuck in the mud.",
                    "It was {w}, stuck in the mud up to the ears.",
                ],
                [
                    "Pulling alone did not help.",
                    "{He} fetched a rope from {q_bare}.",
                    "{He} offered it {f}, but it would not move.",
                ],
                [
                    "Then {k} came, and together they pulled it out.",
                    "{k} heard the shouting, and they pulled it out.",
                    "With {k} they pulled it out on the third try.",
                ],
            ],
            "{h} and {k} pulled {w} out of the mud {p}.",
        ),
        "zh": (
            [
                ["忽然，{ta}听见{p}有叫声。", "{p}传来一阵响声。", "邻居说{p}出事了。"],
                ["原来{w}陷在泥里了。", "只见{w}陷在泥里，动不了。", "那是{w}，陷在泥里，只露出耳朵。"],
                ["一个人怎么拉也没用。", "{ta}从{q}拿来一根绳子。", "{ta}拿{f}引它，它也不动。"],
                [
                    "后来{k}来了，他们一起把它拉了出来。",
                    "{k}听到喊声，跑来一起把它拉了出来。",
                    "加上{k}，拉到第三次，终于把它拉了出来。",
                ],
            ],
            "{h}和{k}在{p}把{w}从泥里拉了出来。",
        ),
    },
    "race": {
        "en": (
            [
                [
                    "{He} met {k} and said: “I am faster than you.”",
                    "{k} dared {him} to a race.",
                    "{h} and {k} both claimed to be the fastest.",
                ],
                ["The prize was {thing}.", "Someone offered {thing} as the prize.", "They ran for {thing}."],
                [
                    "{He} stumbled over {w} and got up again.",
                    "{k} stopped to drink.",
                    "Half of {v} came to watch.",
                    "The road was muddy {q}.",
                ],
                ["{h} was first {p} and won.", "In the last second {h} won {p}.", "{h} won {p} by a nose."],
            ],
            "{h} won {thing} in a race with {k} {p}.",
        ),
        "zh": (
            [
                ["{ta}遇到{k}，说：「我比你跑得快。」", "{k}要和{ta}赛跑。", "{h}和{k}都说自己跑得最快。"],
                ["奖品是{thing}。", "有人拿出{thing}当奖品。", "他们为{thing}而跑。"],
                ["{ta}被{w}绊倒，又爬了起来。", "{k}停下来喝水。", "半个{v}的人都来看。", "{q}的路上全是泥。"],
                ["{h}先到{p}，赢了。", "最后一刻，{h}在{p}赢了。", "{h}在{p}险胜。"],
            ],
            "{h}在{p}和{k}赛跑，赢得了{thing}。",
        ),
    },
}
SUMMARY_PROMPTS = {
    "en": [
        "Sum up in one sentence: {x}",
        "What happened, in short? {x}",
        "Give a summary of this story. {x}",
        "Tell it in one sentence. {x}",
        "Who did what? {x}",
        "Make it short: {x}",
    ],
    "zh": [
        "用一句话概括：{x}",
        "简单说说发生了什么：{x}",
        "请写出这个故事的大意。{x}",
        "一句话讲完：{x}",
        "谁做了什么？{x}",
        "请把故事缩短：{x}",
    ],
}

# Passages with numbers: {a}, {b} are amounts, {s}, {t} things or foods that can be counted; answers are computed.
# name -> language -> (passages, [(question, rule)]); the rule is an expression over a and b or the name of a slot.
PASSAGES = {
    "left": {
        "en": (
            [
                "{h} picked {a} plums {p}. On the way home {he} gave {b} of them to {k}, who was very hungry.",
                "There were {a} plums in {h}'s basket. {k} the {kjob} took {b} for a cake and said thanks twice.",
                "{h} had {a} plums to sell in {v}. By noon {k} had bought {b}; the rest lay in the shade {p}.",
            ],
            [
                ("How many plums does {h} have left?", "a-b"),
                ("How many plums did {k} get?", "b"),
                ("Who got plums from {h}?", "k"),
                ("How many plums did {h} have at first?", "a"),
            ],
        ),
        "zh": (
            [
                "{h}在{p}摘了{a}个李子。回家路上，{ta}给了{k}{b}个，因为{k}饿了。",
                "{h}的篮子里有{a}个李子。{kjob}{k}拿了{b}个去做蛋糕，谢了{ta}两次。",
                "{h}带了{a}个李子到{v}去卖。中午，{k}买走了{b}个，剩下的放在{p}的阴凉处。",
            ],
            [
                ("{h}还剩几个李子？", "a-b"),
                ("{k}得到几个李子？", "b"),
                ("谁从{h}那里得到了李子？", "k"),
                ("{h}原来有几个李子？", "a"),
            ],
        ),
    },
    "total": {
        "en": (
            [
                "At the fair in {v}, {h} sold {a} pots and {k} sold {b}. Everyone bought {f} too.",
                "{h} brought {a} pots {p}. Later {k} came with {b} more pots, and they set up one stall in {v}.",
                "{v} needed pots for the feast. {h} made {a} of them, {k} the {kjob} made {b}, and {w} broke none.",
            ],
            [
                ("How many pots are there in all from {h} and {k}?", "a+b"),
                ("How many pots came from {k}?", "b"),
                ("Which village is the text about?", "v"),
                ("How many pots came from {h}?", "a"),
            ],
        ),
        "zh": (
            [
                "{v}的集市上，{h}卖了{a}个罐子，{k}卖了{b}个。大家还买了{f}。",
                "{h}带了{a}个罐子到{p}。后来{k}又带来{b}个，他们在{v}摆了一个摊。",
                "{v}办宴会要用罐子。{h}做了{a}个，{kjob}{k}做了{b}个，{w}一个也没打破。",
            ],
            [
                ("{h}和{k}一共有几个罐子？", "a+b"),
                ("{k}有几个罐子？", "b"),
                ("文中说的是哪个村子？", "v"),
                ("{h}有几个罐子？", "a"),
            ],
        ),
    },
    "more": {
        "en": (
            [
                "{h} walked {a} miles to {v}, stopping {p} for {f}. {k} lives nearer and walked only {b} miles.",
                "In the contest {p}, {h} caught {a} fish. {k} fell asleep and caught {b}. They call it the {v} cup.",
                "{h} has read {a} books this year. {k} the {kjob} has read {b}, most of them {p} in {v}.",
            ],
            [
                ("By how much is {h} ahead of {k}?", "a-b"),
                ("What is the smaller number?", "b"),
                ("Who is behind?", "k"),
                ("Who is ahead?", "h"),
            ],
        ),
        "zh": (
            [
                "{h}走了{a}里路去{v}，在{p}停下来吃{f}。{k}住得近，只走了{b}里。",
                "在{p}的比赛里，{h}钓了{a}条鱼，{k}睡着了，只钓了{b}条。这叫{v}杯。",
                "{h}今年读了{a}本书。{kjob}{k}读了{b}本，多半是在{v}的{p}读的。",
            ],
            [("{h}比{k}多多少？", "a-b"), ("较小的数是多少？", "b"), ("谁落后？", "k"), ("谁领先？", "h")],
        ),
    },
    "week": {
        "en": (
            [
                "On {d} {h} took {thing} to {v}. On {e} {he} stayed at home and ate {f}.",
                "{h} worked {p} on {d}. {He} rested on {e}, with {f} and {w}, and dreamt of {v}.",
                "Every {d} {h} goes to {v}. Every {e} {k} comes to visit and brings {f}.",
            ],
            [
                ("On which day was there {f}?", "e"),
                ("Which village is the text about?", "v"),
                ("What day comes first in the text?", "d"),
                ("What food is named?", "f"),
            ],
        ),
        "zh": (
            [
                "{d}，{h}带着{thing}去{v}。{e}，{ta}在家吃{f}。",
                "{d}，{h}在{p}干活。{e}{ta}休息，吃{f}，陪着{w}，梦见了{v}。",
                "每个{d}，{h}都去{v}。每个{e}，{k}来看{ta}，带来{f}。",
            ],
            [
                ("哪一天有{f}？", "e"),
                ("文中说的是哪个村子？", "v"),
                ("文中先说的是星期几？", "d"),
                ("文中提到什么食物？", "f"),
            ],
        ),
    },
    "price": {
        "en": (
            [
                "{k} sells {thing} {p} for {a} coins. {h} has only {b} coins and sighs.",
                "“{a} coins,” said {k} in {v}, and held up {thing}. {h} looked into {his} purse: {b} coins.",
                "{h} from {v} saved {b} coins for {thing}. {k} the {kjob} asks {a} coins for it.",
            ],
            [
                ("How many coins does {h} still need?", "a-b"),
                ("What does the thing cost in coins?", "a"),
                ("Who sells it?", "k"),
                ("Who wants to buy it?", "h"),
            ],
        ),
        "zh": (
            [
                "{k}在{p}卖{thing}，要{a}枚硬币。{h}只有{b}枚，叹了口气。",
                "「{a}枚硬币。」{k}在{v}举起{thing}说。{h}看看钱包：{b}枚。",
                "{v}的{h}存了{b}枚硬币，想买{thing}。{kjob}{k}要价{a}枚。",
            ],
            [("{h}还差几枚硬币？", "a-b"), ("这件东西要几枚硬币？", "a"), ("谁在卖？", "k"), ("谁想买？", "h")],
        ),
    },
    "school": {
        "en": (
            [
                "The school of {v} has {a} girls and {b} boys. {h} teaches them songs, and {k} cooks {f}.",
                "{a} girls and {b} boys from {v} went {p}. {h} carried {thing}; {k} carried the lunch.",
                "{h} counted {a} girls {p}. {k} counted {b} boys. Nobody in {v} was missing.",
            ],
            [
                ("How many children are there?", "a+b"),
                ("How many boys are there?", "b"),
                ("Which village is the text about?", "v"),
                ("How many more girls than boys are there?", "a-b"),
            ],
        ),
        "zh": (
            [
                "{v}的学校有{a}个女孩和{b}个男孩。{h}教他们唱歌，{k}给他们做{f}。",
                "{v}的{a}个女孩和{b}个男孩去了{p}。{h}拿着{thing}，{k}提着午饭。",
                "{h}在{p}数了数，有{a}个女孩。{k}数了数，有{b}个男孩。{v}的孩子一个也不少。",
            ],
            [
                ("一共有几个孩子？", "a+b"),
                ("有几个男孩？", "b"),
                ("文中说的是哪个村子？", "v"),
                ("女孩比男孩多几个？", "a-b"),
            ],
        ),
    },
}
READING_PROMPTS = {"en": "{x}\nQuestion: {q}", "zh": "{x}\n问题：{q}"}
