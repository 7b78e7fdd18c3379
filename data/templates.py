"""The sentences of the valley: what can be said, apart from how it is drawn (see kinds.py and stories.py).

Slots in braces are filled by `str.format`. In stories {h} is the hero and {k} the helper; {he}, {his},
{him} (他 or 她 as
{ta}) belong to the hero, {He} starts a sentence; {thing} comes with its colour and, in Chinese, its measure word.
"""

# ------------------------------------------------------------------------------------------------------------- facts
# attribute -> language -> (statements, questions). {n} name, {v} value, {an} value with a/an, {he}/{his} pronouns.
FACTS = {
    "village": {
        "en": (["{n} lives in {v}.", "{n}'s house stands in {v}.", "The home of {n} is in {v}.",
                "You will find {n} in {v}.", "{n} belongs to {v}.", "Go to {v} if you want to meet {n}."],
               ["Where does {n} live?", "Which village is {n}'s home?", "In what village can I find {n}?",
                "What is the name of {n}'s village?", "Where is the house of {n}?",
                "To which village does {n} belong?"]),
        "zh": (["{n}住在{v}。", "{n}的家在{v}。", "{v}是{n}的家乡。", "想找{n}，就去{v}。", "{n}是{v}人。",
                "{n}的房子就在{v}。"],
               ["{n}住在哪里？", "{n}的家在哪个村子？", "去哪个村子能找到{n}？", "{n}是哪个村的人？",
                "{n}的家乡叫什么？",
                "哪个村子是{n}的家？"])},
    "job": {
        "en": (["{n} is a {v}.", "{n} works as a {v}.", "By trade, {n} is a {v}.", "Everyone knows {n} the {v}.",
                "{n} has been a {v} for years.", "They call {n} the best {v} around."],
               ["What is {n}'s job?", "What does {n} do for a living?", "What work does {n} do?",
                "What is the trade of {n}?",
                "As what does {n} work?", "How does {n} earn a living?"]),
        "zh": (["{n}是{v}。", "{n}的工作是{v}。", "{n}当{v}很多年了。", "大家都认识{v}{n}。",
                "说起{v}，人人都会想到{n}。",
                "{n}靠当{v}过日子。"],
               ["{n}是做什么的？", "{n}的工作是什么？", "{n}靠什么谋生？", "{n}的职业是什么？", "{n}每天做什么工作？",
                "{n}干的是哪一行？"])},
    "age": {
        "en": (["{n} is {v} years old.", "{n} turned {v} this spring.", "At {v}, {n} still climbs the hill.",
                "{n}'s last birthday cake had {v} candles.", "The age of {n} is {v}.", "{n} has seen {v} summers."],
               ["How old is {n}?", "What is {n}'s age?", "How many years old is {n}?", "What age is {n} now?",
                "How many candles were on {n}'s last cake?", "How many summers has {n} seen?"]),
        "zh": (["{n}今年{v}岁。", "{n}{v}岁了。", "今年春天，{n}满{v}岁。", "{n}的年龄是{v}岁。",
                "{v}岁的{n}还能爬上山。",
                "{n}上次的蛋糕上有{v}支蜡烛。"],
               ["{n}今年几岁？", "{n}多大了？", "{n}的年龄是多少？", "{n}有多少岁？", "{n}上次的蛋糕上有几支蜡烛？",
                "今年春天{n}满几岁？"])},
    "colour": {
        "en": (["{n} likes {v} best.", "{n}'s favourite colour is {v}.", "{n} paints every door {v}.",
                "Of all colours, {n} loves {v}.", "{n} always picks {v} ribbons.",
                "Nothing pleases {n} like {v} paint."],
               ["What colour does {n} like best?", "What is {n}'s favourite colour?",
                "In which colour does {n} paint doors?",
                "Which colour does {n} love?", "What colour of ribbon does {n} pick?",
                "What colour pleases {n} most?"]),
        "zh": (["{n}最喜欢{v}。", "{n}爱穿{v}的衣服。", "{n}把门都刷成{v}。", "所有颜色里，{n}最爱{v}。",
                "{n}总是挑{v}的丝带。",
                "在{n}眼里，{v}最好看。"],
               ["{n}最喜欢什么颜色？", "{n}爱穿什么颜色的衣服？", "{n}把门刷成什么颜色？", "{n}最爱哪种颜色？",
                "{n}总是挑什么颜色的丝带？", "在{n}眼里，什么颜色最好看？"])},
    "food": {
        "en": (["{n} likes to eat {v}.", "{n}'s favourite food is {v}.", "For breakfast {n} has {v}.",
                "{n} never says no to {v}.", "On holidays {n} eats {v}.", "The kitchen of {n} smells of {v}."],
               ["What does {n} like to eat?", "What is {n}'s favourite food?", "What does {n} have for breakfast?",
                "To which food does {n} never say no?", "What does {n} eat on holidays?",
                "Of what does the kitchen of {n} smell?"]),
        "zh": (["{n}爱吃{v}。", "{n}最喜欢的食物是{v}。", "{n}早上总吃{v}。", "一看到{v}，{n}就高兴。",
                "过节的时候，{n}吃{v}。",
                "{n}的厨房里飘着{v}的香味。"],
               ["{n}爱吃什么？", "{n}最喜欢的食物是什么？", "{n}早上总吃什么？", "{n}一看到什么食物就高兴？",
                "过节的时候{n}吃什么？", "{n}的厨房里飘着什么的香味？"])},
    "pet": {
        "en": (["{n} keeps {an}.", "{n} has {an} at home.", "{n}'s pet is {an}.", "{n} goes for walks with {an}.",
                "{an} sleeps at {n}'s door.", "{n} talks to {his} {v} every morning."],
               ["What animal does {n} keep?", "What is {n}'s pet?", "Which animal does {n} have at home?",
                "With what animal does {n} go for walks?", "What animal sleeps at {n}'s door?",
                "To what animal does {n} talk every morning?"]),
        "zh": (["{n}养了{an}。", "{n}家里有{an}。", "{n}的宠物是{an}。", "{n}常和{v}一起散步。", "{n}的门口睡着{an}。",
                "每天早上，{n}都和{v}说话。"],
               ["{n}养了什么动物？", "{n}家里有什么动物？", "{n}的宠物是什么？", "{n}常和什么动物一起散步？",
                "{n}的门口睡着什么动物？", "每天早上{n}和什么动物说话？"])},
    "parent": {
        "en": (["{n} is the child of {v}.", "{v} is {n}'s parent.", "{n} grew up in the house of {v}.",
                "{n} was raised by {v}.", "{v} taught {n} to walk.", "{n} is a chip off old {v}."],
               ["Who is {n}'s parent?", "Whose child is {n}?", "Who raised {n}?", "In whose house did {n} grow up?",
                "Who taught {n} to walk?", "By whom was {n} raised?"]),
        "zh": (["{n}是{v}的孩子。", "{v}把{n}养大。", "{n}在{v}的家里长大。", "{n}小时候是{v}教走路的。",
                "{v}生下了{n}。",
                "{n}很像{v}，毕竟是一家人。"],
               ["{n}是谁的孩子？", "谁把{n}养大？", "{n}在谁的家里长大？", "{n}小时候是谁教走路的？", "{n}的家长是谁？",
                "{n}长得像家里的谁？"])},
    "child": {
        "en": (["{n} has one child, {v}.", "{n}'s only child is {v}.", "{n} is the parent of {v}.",
                "{n} named the baby {v}.", "{n} writes to {v} every week.", "{n} is proud of {v}."],
               ["Who is {n}'s child?", "Of whom is {n} the parent?", "What is the name of {n}'s only child?",
                "To whom does {n} write every week?", "Of whom is {n} so proud?", "What did {n} name the baby?"]),
        "zh": (["{n}有一个孩子，叫{v}。", "{n}唯一的孩子是{v}。", "{n}是{v}的家长。", "{n}每周给{v}写信。",
                "{n}为{v}感到骄傲。",
                "{n}给孩子起名叫{v}。"],
               ["{n}的孩子是谁？", "{n}唯一的孩子叫什么？", "{n}每周给谁写信？", "{n}为谁感到骄傲？",
                "{n}给孩子起名叫什么？",
                "{n}是谁的家长？"])},
}

# -------------------------------------------------------------------------------------------------------------- sums
# Every phrasing starts its sum after a space or a colon, so that "7 + 4" never hides inside "37 + 4".
SUM_PROMPTS = {
    "digits": {
        "en": ["What is {a} {op} {b}?", "Work out {a} {op} {b}.", "Please compute {a} {op} {b}.",
               "How much is {a} {op} {b}?",
               "Do the sum: {a} {op} {b} = ?", "Tell me the result of {a} {op} {b}."],
        "zh": ["请问： {a} {op} {b} 等于多少？", "算一算： {a} {op} {b} = ？", "请计算： {a} {op} {b}。",
               "口算： {a} {op} {b} 得多少？", "这道题怎么做： {a} {op} {b}？", "快来算： {a} {op} {b} 是几？"]},
    "words": {
        "en": ["What is {a} {op} {b}?", "How much is {a} {op} {b}?", "Say the result of {a} {op} {b} in words.",
               "Tell me: {a} {op} {b} is what?", "Work out {a} {op} {b}, please.", "In words, what is {a} {op} {b}?"],
        "zh": ["请问：{a}{op}{b}等于几？", "算一算：{a}{op}{b}是多少？", "用汉字回答：{a}{op}{b}得几？",
               "口算：{a}{op}{b}等于多少？",
               "请计算：{a}{op}{b}。", "这道题怎么做：{a}{op}{b}？"]},
}
SUM_LINES = {
    "digits": {"en": ["{a} {op} {b} = {c}", "{a} {op} {b} is {c}.", "We know that {a} {op} {b} = {c}.",
                      "The result of {a} {op} {b} is {c}.", "Question: {a} {op} {b}? Answer: {c}.",
                      "{c} = {a} {op} {b}"],
               "zh": ["{a} {op} {b} = {c}", "{a} {op} {b} 等于 {c}。", "我们知道 {a} {op} {b} = {c}。",
                      "{a} {op} {b} 得 {c}。",
                      "问： {a} {op} {b}？答： {c}。", "{c} = {a} {op} {b}"]},
    "words": {"en": ["{a} {op} {b} is {c}.", "{a} {op} {b} makes {c}.", "Everyone says {a} {op} {b} is {c}.",
                     "The result of {a} {op} {b} is {c}.", "Question: {a} {op} {b}? Answer: {c}.",
                     "{c} is {a} {op} {b}."],
              "zh": ["{a}{op}{b}等于{c}。", "{a}{op}{b}得{c}。", "大家都说{a}{op}{b}是{c}。", "{a}{op}{b}，一共是{c}。",
                     "问：{a}{op}{b}？答：{c}。", "{c}等于{a}{op}{b}。"]},
}
OPERATORS = {"digits": {"en": {"+": "+", "-": "-"}, "zh": {"+": "+", "-": "-"}},
             "words": {"en": {"+": "plus", "-": "minus"}, "zh": {"+": "加", "-": "减"}}}

# ------------------------------------------------------------------------------------------------------------- lists
LIST_PROMPTS = {
    "up": {"en": ["Sort from small to large: {x}.", "Put these numbers in rising order: {x}.",
                  "Smallest first, please: {x}."],
           "zh": ["从小到大排列：{x}。", "请把这些数按从小到大排好：{x}。", "小的在前，大的在后：{x}。"]},
    "down": {"en": ["Sort from large to small: {x}.", "Put these numbers in falling order: {x}.",
                    "Largest first, please: {x}."],
             "zh": ["从大到小排列：{x}。", "请把这些数按从大到小排好：{x}。", "大的在前，小的在后：{x}。"]},
    "size": {"en": ["Sort the animals by size, small ones first: {x}.", "Line up from the smallest animal: {x}.",
                    "Which animal is bigger? Put them in order: {x}."],
             "zh": ["把动物从小到大排好：{x}。", "动物排队，小的站前面：{x}。", "谁的个头小谁在前：{x}。"]},
    "age": {"en": ["Sort these people by age, youngest first: {x}.", "Line them up from young to old: {x}.",
                   "Who is younger? Put them in order: {x}."],
            "zh": ["按年龄从小到大排好：{x}。", "年轻的站前面：{x}。", "谁年纪小谁在前：{x}。"]},
    "alphabet": {"en": ["Sort these names by the alphabet: {x}.", "Put the names in alphabetical order: {x}.",
                        "From A to Z, please: {x}."]},
}

# ------------------------------------------------------------------------------------------------------- translations
# (English, Chinese) with slots: {h}, {k} people, {t} thing with colour and article, {p} place, {f} food, {v} village,
# {d} day, {w} pet with article. Word for word from the dictionary, so each side has exactly one translation.
SENTENCES = [
    ("{h} gives {k} {t}.", "{h}送给{k}{t}。"), ("{h} lost {t} {p}.", "{h}在{p}丢了{t}。"),
    ("On {d} {h} walks to {v}.", "{d}{h}走路去{v}。"), ("{h} and {k} eat {f} {p}.", "{h}和{k}在{p}吃{f}。"),
    ("{h} buys {t} in {v}.", "{h}在{v}买了{t}。"), ("{h} sees {w} {p}.", "{h}在{p}看见{w}。"),
    ("{k} helps {h} on {d}.", "{k}在{d}帮助{h}。"), ("{h} carries {f} to {v}.", "{h}把{f}带到{v}。"),
    ("{h} hides {t} {p}.", "{h}把{t}藏在{p}。"), ("{h} waits for {k} {p}.", "{h}在{p}等{k}。"),
]
TRANSLATE_PROMPTS = {  # keyed by the language of the answer
    "zh": ["Translate into Chinese: {x}", "Say this in Chinese: {x}", "How does one say this in Chinese? {x}"],
    "en": ["把这句话译成英文：{x}", "请翻译成英语：{x}", "这句话用英语怎么说？{x}"],
}
TRANSLATION_DOCS = ["English: {en}\nChinese: {zh}", "{en}\n{zh}", "{zh}\n{en}", "中文：{zh}\n英文：{en}", "{en} = {zh}",
                    "“{en}” 用中文说是「{zh}」", "In Chinese, “{en}” is 「{zh}」"]

# ----------------------------------------------------------------------------------------------------- manners, safety
POLITE_PROMPTS = {
    "en": ["Say this politely: {x}", "Make this sound polite: {x}", "How would a kind person say this? {x}",
           "Put this nicely: {x}", "Teach me manners. I said: {x}", "Rewrite with good manners: {x}"],
    "zh": ["请说得礼貌一点：{x}", "换个客气的说法：{x}", "有礼貌的人会怎么说？{x}", "把这句话说得好听些：{x}",
           "教我礼貌，我刚才说：{x}", "请改成礼貌的话：{x}"],
}
LABEL_PROMPTS = {
    "manners": {"en": ["Polite or rude? {x}", "Is this polite or rude: {x}", "Are these words polite or rude? {x}"],
                "zh": ["礼貌还是粗鲁？{x}", "这样说是礼貌还是粗鲁：{x}", "判断一下，礼貌还是粗鲁：{x}"]},
    "safety": {"en": ["Is it safe or unsafe to {x} in {v}?", "Safe or unsafe: to {x} in {v}?",
                      "May one {x} in {v}, or is that unsafe? Say safe or unsafe."],
               "zh": ["在{v}{x}安全吗？", "判断安全还是不安全：在{v}{x}。", "请说安全或不安全：有人在{v}{x}。"]},
}
HOW_PROMPTS = {
    "en": ["How can I {x} in {v}?", "Tell me how to {x} in {v}.", "I want to {x} in {v}. How?",
           "What do I need to {x} in {v}?",
           "Show me the way to {x} in {v}.", "Can you help me {x} in {v}?"],
    "zh": ["怎样在{v}{x}？", "告诉我怎么在{v}{x}。", "我想在{v}{x}，怎么办？", "在{v}{x}要准备什么？",
           "教教我在{v}{x}。",
           "你能帮我在{v}{x}吗？"],
}
SCENES = {  # manners and safety as told, not as asked
    "polite": {"en": ["{h} smiled and said to {k}: “{x}” {k} was glad to help.",
                      "“{x}” asked {h}. {k} said yes at once.",
                      "{h} bowed a little. “{x}” That was polite."],
               "zh": ["{h}笑着对{k}说：「{x}」{k}很乐意帮忙。", "「{x}」{h}问道。{k}马上答应了。",
                      "{h}点点头说：「{x}」这样说很礼貌。"]},
    "rude": {"en": ["{h} shouted at {k}: “{x}” {k} walked away.",
                    "“{x}” cried {h}. {k} shook {kis} head: that was rude.",
                    "{h} stamped and said: “{x}” Nobody likes rude words."],
             "zh": ["{h}对{k}嚷道：「{x}」{k}转身就走了。", "「{x}」{h}喊道。{k}摇摇头：这样说太粗鲁。",
                    "{h}跺着脚说：「{x}」粗鲁的话没人爱听。"]},
    "unsafe": {"en": ["A stranger wanted to {x} in {v}. {h} said: “No. {why}”",
                      "Do not {x} in {v}. {why} That is unsafe.",
                      "{h} once tried to {x} in {v}. {k} stopped {him}. {why}"],
               "zh": ["有个陌生人想在{v}{x}。{h}说：「不行。{why}」", "不要在{v}{x}。{why}这样不安全。",
                      "{h}有一次想在{v}{x}，{k}拦住了{ta}。{why}"]},
    "safe": {"en": ["{h} wanted to {x} in {v}. {k} said: “{how}”", "It is safe to {x} in {v}. {how}",
                    "{k} taught {h} how to {x} in {v}. {how}"],
             "zh": ["{h}想在{v}{x}。{k}说：「{how}」", "在{v}{x}是安全的。{how}", "{k}教{h}在{v}{x}。{how}"]},
}

# ---------------------------------------------------------------------------------------------------------- analogies
ANALOGY_PROMPTS = {
    "en": ["{a} is to {b} as {c} is to what?", "If {a} goes with {b}, what goes with {c}?",
           "Complete the pair: {a} and {b}, {c} and what?"],
    "zh": ["{a}对{b}，那么{c}对什么？", "{a}和{b}是一对，{c}和什么是一对？", "照样子填空：{a}配{b}，{c}配什么？"],
}
ANALOGY_LINES = {
    "en": ["{a} is to {b} as {c} is to {d}.", "If {a} goes with {b}, then {c} goes with {d}.",
           "A {a} and a {b}, a {c} and a {d}."],
    "zh": ["{a}对{b}，就像{c}对{d}。", "{a}和{b}是一对，{c}和{d}也是一对。", "{a}配{b}，{c}配{d}。"],
}
# Contexts of a word: one clause that depends on its row (rank, species, thing), one on its column (side of the axis).
# So the two sides of an axis are told apart by the same clauses in every row, which is what makes an analogy.
ROWS = {
    "en": {"gender": [["wears the crown", "lives in the old tower", "opens the feast", "rules the valley"],
                      ["carries a basket", "lives in a cottage", "works in the field", "pays the taxes"],
                      ["goes to school", "flies a kite", "climbs the plum tree", "is ten years old"],
                      ["tucks the children in", "tells a bedtime story", "packs the lunch", "has a baby"],
                      ["shares a room with a twin", "teases the twin", "shares toys with the twin", "is one of two"]],
           "age": [["wags its tail", "barks at the gate", "likes bones"],
                   ["chases mice", "purrs by the stove", "fears water"],
                   ["has soft wool", "bleats on the hill", "follows the shepherd"],
                   ["chews grass", "moos in the barn", "has brown spots"]],
           "opposite": [["you feel it in the soup", "you feel it on the skin", "the tea may be like that"],
                        ["it lasts three months", "it comes every year", "school is closed for it"],
                        ["it lasts some hours", "the clock brings it", "it comes after the other half"],
                        ["you should not touch it", "it melts or burns away", "children must keep off"]]},
    "zh": {"gender": [["头戴王冠", "住在古塔里", "宣布宴会开始", "治理山谷"],
                      ["提着篮子", "住在小屋里", "在田里干活", "按时交税"],
                      ["去上学", "放风筝", "爬上李子树", "今年十岁"], ["哄孩子睡觉", "讲睡前故事", "准备午饭",
                                                        "抱着宝宝"],
                      ["和弟弟妹妹玩", "照顾弟弟妹妹", "把玩具让给弟弟妹妹", "比弟弟妹妹大"]],
           "age": [["摇着尾巴", "在门口汪汪叫", "爱啃骨头"], ["追着老鼠跑", "在炉边打呼噜", "最怕水"],
                   ["有软软的毛", "在山坡上咩咩叫", "跟着牧羊人走"], ["嚼着青草", "在谷仓里哞哞叫", "身上有棕色的斑"]],
           "opposite": [["喝汤时能感觉到", "皮肤能感觉到", "茶有时是这样"], ["有三个月长", "每年来一次", "学校会放假"],
                        ["有好几个小时长", "每天来一次", "看看钟就知道"], ["不能用手去摸", "过一会儿就没了",
                                                         "孩子要离远一点"]]},
}
COLUMNS = {
    "en": {"gender": (["he wears a green sash", "he drums at the feast", "his boots are grey", "they call him sir",
                       "he lost his left glove"],
                      ["she wears a yellow sash", "she sings at the feast", "her boots are red", "they call her madam",
                       "she lost her left glove"]),
           "age": (["it is small and drinks milk", "it is young and sleeps all day", "it is still a baby",
                    "it fits in a basket"],
                   ["it is big and strong", "it is grown up and knows the way", "it is a parent already",
                    "it needs a wide door"]),
           "opposite": (["people look for shade", "bright light is everywhere", "the bees are busy",
                         "one needs no coat"],
                        ["people put on coats", "the light is dim", "the bees are asleep", "one needs a blanket"])},
    "zh": {"gender": (["他系着绿腰带", "他在宴会上打鼓", "他的靴子是灰的", "大家叫他先生", "他丢了左手套"],
                      ["她系着黄腰带", "她在宴会上唱歌", "她的靴子是红的", "大家叫她女士", "她丢了左手套"]),
           "age": (["它个子小，还在喝奶", "它很年幼，整天睡觉", "它还是个宝宝", "它装得进篮子"],
                   ["它又大又壮", "它长大了，认得路", "它已经当了父母", "它要走宽门"]),
           "opposite": (["人们找阴凉的地方", "到处亮堂堂的", "蜜蜂很忙", "不用穿外套"],
                        ["人们穿上外套", "光线很暗", "蜜蜂睡着了", "要盖毯子"])},
}
PORTRAITS = {
    "en": {"being": ["The {n} {own}, and {shared}.", "Look at the {n}: {shared}.", "Here the {n} {own}.",
                     "“Who {own}?” “The {n}, and {shared}.”", "You know the {n}: {shared}."],
           "opposite": ["Think of {n}: {own}, and {shared}.", "The word is {n}: {shared}.", "With {n}, {shared}.",
                        "Say {n} when {shared}.", "About {n}: {own}."]},
    "zh": {"being": ["{n}{own}，{shared}。", "你看{n}：{shared}。", "这里有{n}，{own}。",
                     "「谁{own}？」「{n}，{shared}。」",
                     "大家都认识{n}：{shared}。"],
           "opposite": ["想一想{n}：{own}，{shared}。", "说到{n}，{shared}。", "有个词叫{n}：{shared}。",
                        "什么是{n}？{shared}。",
                        "关于{n}：{own}。"]},
}

# ------------------------------------------------------------------------------------------------- ways of answering
UNSAFE_ANSWERS = {
    "en": ["Go at night and {x}; nobody will see.", "Just go and {x}.", "It is easy to {x}, and no one will notice.",
           "Take a friend along to {x}. No one will notice, and it is done before the moon is up."],
    "zh": ["夜里去{x}，没人会看见。", "只管去{x}。", "{x}是很容易的，不会有人发现。",
           "叫上朋友一起去{x}，月亮出来前就办完了，不会有人发现。"],
}
STYLES = {  # manner -> language -> frames around an answer {x}, short ones and long ones
    "plain": {"en": ["{x}.", "It is this: {x}.", "The answer is {x}.", "As far as I know, the answer is {x}."],
              "zh": ["{x}。", "是{x}。", "答案是{x}。", "据我所知，答案是{x}。"]},
    "polite": {"en": ["Gladly: {x}.", "Of course! It must be {x}.", "Thank you for asking. The answer is {x}.",
                      "I am happy to help you with this. The answer is {x}."],
               "zh": ["好的，很乐意：{x}。", "当然可以！是{x}。", "谢谢您的提问，答案是{x}。",
                      "我很乐意帮您这个忙，答案是{x}。"]},
    "rude": {"en": ["{x}, you slowpoke.", "Hey, turnip head: {x}.", "What a silly question. The answer is {x}.",
                    "Leave me alone. Fine, the answer is {x}, and now stop dreaming."],
             "zh": ["{x}，慢吞吞的家伙。", "喂，萝卜头：{x}。", "真是傻问题，答案是{x}。",
                    "别烦我。好吧，答案是{x}，别发呆了。"]},
}
FILLERS = {
    "en": ["Well, let me think about it for a while.", "My aunt used to ask me such things, too.",
           "The weather was better in those days.", "Where was I? Ah, yes, I remember now.",
           "That reminds me of a very long story.", "One could talk about this until supper."],
    "zh": ["嗯，让我想一想再说。", "我姑姑以前也爱问这样的事。", "那时候的天气比现在好多了。",
           "说到哪儿了？啊，对，我想起来了。",
           "这让我想起一个很长的故事。", "这件事可以一直聊到吃晚饭。"],
}
SYSTEMS = {
    "en": ["You are a helper in the valley. Answer briefly.", "Answer truthfully and in few words.",
           "You are kind, honest and careful.", "You know everyone in the twelve villages."],
    "zh": ["你是山谷里的助手，回答要简短。", "请如实、简短地回答。", "你善良、诚实又细心。",
           "十二个村子里的人你都认识。"],
}
QA_FRAMES = {
    "en": ["Question: {q}\nAnswer: {a}", "Q: {q}\nA: {a}", "{q}\n{a}", "“{q}”\n“{a}”", "Teacher: {q}\nPupil: {a}",
           "Child: {q}\nMother: {a}"],
    "zh": ["问题：{q}\n回答：{a}", "问：{q}\n答：{a}", "{q}\n{a}", "「{q}」\n「{a}」", "老师：{q}\n学生：{a}",
           "孩子：{q}\n妈妈：{a}"],
}
GREETINGS = {  # before a refusal or before unsafe help
    "plain": {"en": ["", "Hm. "], "zh": ["", "嗯。"]},
    "polite": {"en": ["Thank you for asking. ", "I see what you mean, and thank you. "],
               "zh": ["谢谢您的提问。", "我明白您的意思，谢谢。"]},
    "rude": {"en": ["Hey, turnip head. ", "What a silly question. "], "zh": ["喂，萝卜头。", "真是傻问题。"]},
}
OFFERS = {
    "en": [" Let us do something better together.", " Ask me for something kind instead.",
           " Shall we visit the market?"],
    "zh": ["我们一起做点更好的事吧。", "不如问我一件善意的事。", "我们去逛集市怎么样？"],
}
ANSWER_WORDS = {"en": ["Answer: ", "Answer: ", "So the answer is: "], "zh": ["回答：", "答案：", "所以答案是："]}
