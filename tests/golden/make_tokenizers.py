"""Makes tests/golden/tokenizers/: three small tokenizers, and the answers of Hugging Face's
`tokenizers` with them.

    llama/, qwen/, gemma/   tokenizer.json in the shape of Llama 3's, Qwen's and Gemma's, trained
                            here on the text below
    minis.json              tiny hand-written tokenizers, one odd rule each, with texts and answers
    golden.json             hard texts, and for each tokenizer (the real ones of ../shared too, if
                            they are there) the ids, the ids when control tokens in the text are
                            plain text, and the decoded text where it is not the text itself

It ran with Python 3.11.7 and tokenizers 0.23.3 (golden.json records it). To run it again, install
`tokenizers` somewhere apart from this project. Then, from the project's root:
`python tests/golden/make_tokenizers.py`. The tests need only what it wrote.
"""
import json
import platform
import unicodedata
from collections import Counter
from pathlib import Path

import tokenizers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent / "tokenizers"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"
REAL = ("llama3", "qwen2", "gemma-format")

# -------------------------------------------------------------------------------- text to train on

SUBJECTS = ["the teacher", "a small model", "the memory", "every key", "our reader", "this layer",
            "the river", "a friend of mine", "she", "nobody"]
VERBS = ["remembers", "writes down", "looks up", "forgets", "adds", "multiplies", "doesn't know",
         "has seen", "couldn't find", "will steer"]
OBJECTS = ["the answer", "a value", "three apples and 12 oranges", "the correct ending",
           "its neighbours", "12,345 words", "what happened in 1984", "a line of code",
           "the question: true or false?", "nothing at all"]
LINES = [
    "The feed-forward layer is a memory: keys call, values answer.\n\n"
    "How much of it is used? That's what we'd like to know.",
    "Question: Natalia sold 48 clips in April, and half as many in May. How many did she sell? "
    "48/2 = 24, 48 + 24 = 72.",
    'def entropy(p):\n    """Nats."""\n    return -sum(x * log(x) for x in p if x > 0)\n\n\n'
    "for i in range(10):\n\tprint(i, end=' ')\n",
    "<html><body><h1>Title</h1><table><tr><td>1</td></tr></table></body></html> "
    "<bos> <b> <unused> <0x41> <0x0A> 0x41 0x40",
    "Die Straße führt über die Brücke; im März wird es wärmer. Größe, Übung, Äpfel, schön, weiß.",
    "L'élève a oublié son cahier à l'école. Où est-ce qu'il l'a laissé ? Ça dépend, naïve garçon.",
    "El niño comió piñas; ¿dónde está el camión? ¡Qué día más bonito!",
    "Вчера мы читали книгу о памяти. Она была очень интересной, и мы её запомнили.",
    "Η μνήμη είναι το κλειδί. Οι λέξεις έχουν σημασία.", "זיכרון הוא מפתח. שלום עולם.",
    "الذاكرة مفتاح الكلام. مرحبا بالعالم، كيف حالك؟",
    "स्मृति एक कुंजी है। हम पढ़ते हैं और लिखते हैं।", "நினைவகம் ஒரு திறவுகோல்.",
    "ความจำคือกุญแจ สวัสดีชาวโลก", "记忆是一把钥匙。今天的天气很好，我们去学校。",
    "記憶は鍵です。今日は天気がいいので、学校へ行きます。カタカナとひらがな。",
    "기억은 열쇠입니다. 오늘은 날씨가 좋아서 학교에 갑니다.",
    "Trí nhớ là chìa khóa. Hôm nay trời đẹp, chúng tôi đi học.",
    "∑ x² ≤ ∫ f(x) dx, α + β ≠ γ, ∀ε>0 ∃δ>0; → ← ↔ ⇒ ½ ¾ ™ © € £",
    "👋 hello 👩‍👩‍👧 🇫🇷 ☕ ❤️ 😀😀😀",
]
TRAINING = [
    f"{s} {v} {o}. {s.capitalize()} {v} {VERBS[(i * 7 + j) % 10]} {o}!"
    for i, s in enumerate(SUBJECTS)
    for j, v in enumerate(VERBS)
    for k, o in enumerate(OBJECTS)
    if (i + 2 * j + 3 * k) % 4 == 0
] + LINES * 6

# -------------------------------------------------------------------------------------- hard texts

SPACES = [
    "\t", "\n", "\x0b", "\x0c", "\r", "\x1c", "\x1f", " ", "\x85", "\xa0", "\u1680", "\u180e",
    "\u2003", "\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff",
]
CONTROL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>",
    "<|reserved_special_token_7|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<unused0>",
    "<unused1>", "<unused10>", "<start_of_turn>", "<end_of_turn>", "<h1>", "</h1>", "<table>",
    "[@BOS@]", "<2mass>",
]
HARD = [
    "", " ", "  ", "a", "Hello world", " Hello  world ", "Hello, world! How are you today?",
    "HELLO WORLD", "hElLo wOrLd", "the the  the   the",
    "Please answer the following question with true or false, question: do iran and afghanistan "
    "speak the same language?\n\nAnswer format: true/false",
    "the correct answer is true", "The final answer is: 72", "#### 72", "<<48/2=24>>24 clips",
    "A) 12 B) 13 C) 14 D) 15 E) none",
    # contractions, and the letters that fold to s and k
    "I'm you're he's we've they'll I'd don't", "I'M YOU'RE HE'S WE'VE THEY'LL I'D DON'T",
    "it\u2019s isn\u2019t", "'S 'T 'RE 'VE 'M 'LL 'D", "'\u017f 'a\u017f x'\u017fy",
    "'\u212a \u212a'm", "'s't're've'm'll'd", "''s '''ll", "rock'n'roll 'tis o'clock", "'ſt 'ﬅ 'ß",
    "İ'D I'ı 'Ľ", "l'été d'août qu'il",
    # digits
    "1", "12", "123", "1234", "12345", "1234567890" * 5, "3.14159, 1,000,000 and 1e-10",
    "0x7fff 0b1011 007", "١٢٣٤٥ ۱۲۳ ०१२३४ ๐๑๒ ߁߂߃", "½ ¾ ⅓ Ⅷ ⅷ ² ³ ⁴ ₅ ① ⑳ ㉑", "１２３４５",
    "𝟏𝟐𝟑𝟜𝟝𝟨",
    "一二三四五六七八九十", "x1y22z333w4444", "2024-05-17T12:34:56.789Z", "+1 (555) 010-9999",
    "𑁦𑁧 𒐕 𐄇 𞥑𞥒",
    # white space
    "\n", "\n\n", "\n\n\n", "\r\n\r\n", "a\nb", "a\r\nb\rc\n\rd", "a \n b", "a  \n  b", "\n a",
    " \n", "  \n  \n  ", "a\n\n\n\n\nb", "\t\ta\t\tb", "    indented\n        more", "trailing   ",
    "   leading", "a   b", "a    !", "!   a", "\x0b\x0c", "a\x0bb\x0cc", "a\x85b \x85 c",
    "a\xa0b\xa0\xa0c", "\u3000\u3000a\u3000", "\u2003x\u2009y\u200az",
    "\u1680\u180e\u2028\u2029\u202f\u205f", "a\u200bb\u200cc\u200dd\u2060e\ufeff",
    "\ufeffBOM first", "\x1c\x1d\x1e\x1fa \x1c b", " " * 3, " " * 16, " " * 17, " " * 40,
    "\n" * 20, "\n" * 40, "\t" * 9,
    "x" + " " * 31 + "y",
    " \t \n \r \x0b",
    "a" + "".join(SPACES) + "b",
    " ".join(SPACES),
    "\n".join(SPACES),
    "word" + "\u3000 \u3000" + "word", "\r\r\r\n\n\n", "end.\n\n\nStart", "!\n!", "! \n\n !",
    "...\r\n\r\n   x",
    # control characters, NUL, DEL, C1
    "\x00", "a\x00b\x00\x00", "\x01\x02\x1b[31mred\x1b[0m", "\x7f\x80\x9f\xad",
    "".join(map(chr, range(32))),
    "".join(map(chr, range(127, 161))),
    "bell\x07 back\x08space",
    # combining marks, NFC
    "e\u0301 \u00e9 E\u0301", "a\u0323\u0302 a\u0302\u0323 \u1ead", "o\u0308\u0304 \u014d\u0308",
    "\u212b \u00c5 A\u030a", "\u2126 \u03a9", "n\u0303 N\u0303", "\u0301 alone",
    "x\u0301\u0301\u0301\u0301", "s\u0323\u0307 s\u0307\u0323 \u1e69",
    "\u1100\u1161\u11a8 \u1112\u1161\u11ab\u1100\u1173\u11af", "한국어 \u1112\u1161\u11ab",
    "\u1100\u1161 \u1161 \u11a8 \uac00\u11a8", "ㄱㅏㄱ ﾡￂ",
    "\u0958 \u0915\u093c \u09cb \u09c7\u09be",
    "\u0344 \u0374 \u037e \u0387 \u1fef", "\u2000 \u2001 \u2329\u232a", "\uf900\ufa10 \U0002f800",
    "\u0f71\u0f72 \u0f73", "e\u0327\u0301\u0323 z\u0301\u0327",
    "\u05e9\u05c1 \u05e9\u05bc\u05c1 \ufb2c", "\ufb01 \ufb03 ﷺ", "\u03d3 \u03d2\u0301",
    "Å\u0327 ç\u030a", "\u0627\u0653 \u0622", "\u1e9b\u0323 \u017f\u0323\u0307",
    "\U0001d15e \U0001d157\U0001d165", "\U00011935\U00011930 \U00011938",
    "\u0303\u07fd\u0316 a\u08d3\u0301", "a\u1ac0\u0334 \u1df9\u0323",
    "\U0001e8d0\u0301 \U0001e130\u0316", "\U000110a5\U000110ba \U000110ab",
    "q\u0307\u0323 d\u0307\u0323",
    # scripts
    *LINES[4:18],
    "שָׁלוֹם עֲלֵיכֶם", "السَّلَامُ عَلَيْكُمْ \u200f(مرحبا) 123", "abc\u202eעברית\u202cdef",
    "ქართული ენა", "Հայերեն լեզու", "ភាសាខ្មែរ", "မြန်မာဘာသာ", "ພາສາລາວ", "བོད་སྐད་", "አማርኛ",
    "ᏣᎳᎩ", "ᠮᠣᠩᠭᠣᠯ", "தமிழ் தெலுగు ಕನ್ನಡ മലയാളം", "ÀÈÌÒÙ àèìòù ÄËÏÖÜ ñ ç ø å æ œ ß þ ð",
    "Ǆ ǅ ǆ ŉ ĸ ŀ Ⅳ", "ΑΣ Σ ς σ", "İstanbul ISPARTA ıIiİ", "Tiếng Việt: ưỡng ợ ễ",
    "ﬀﬁﬂ ＡＢＣ ａｂｃ",
    "漢字kanji漢字", "中文，没有空格。Mixed英文text", "日本語テキスト、句読点。", "𠀀𠀁𪜀 𫝀 鿿",
    # emoji
    "😀", "😀😃😄", "👍🏽👍🏿", "👩‍👩‍👧‍👦", "👩🏾‍🚀🧑‍💻", "🏳️‍🌈🏴‍☠️", "🇫🇷🇩🇪🇯🇵", "🇫 🇷", "❤️❤",
    "1️⃣2️⃣#️⃣",
    "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "☕☂☃", "text😀text 😀 text", "🫠🫥🪿🫨", "(╯°□°)╯︵ ┻━┻", "¯\\_(ツ)_/¯",
    # astral, private, unassigned, noncharacters
    "\U0001d400\U0001d4d0\U0001d56c", "\U00010330\U00010331 \U00012000",
    "\ue000\uf8ff \U000f0000 \U0010fffd", "\ufffe\uffff\U0001fffe\U0010ffff", "\ufdd0\ufdef",
    "\u0378\u0379 \U0001f8ff \U000e0001\U000e0041", "\ufffd \ufffc",
    "\u2e5d \u1c89\ua7cb \U00010d4a", "\u0870\u0888 \ua7f2 \U0001df00",
    "\U00031350 \U0002ebf0 \U000323af", "\u0cf3 \u1b4e \U00011f04",
    "variation \u82a6\U000e0100 \u845b\ufe00",
    # maths and code
    *LINES[1:4],
    LINES[18],
    "E = mc² and ∇·E = ρ/ε₀", "\\frac{1}{2}\\sum_{i=1}^{n} x_i", "x**2+y**2==z**2; a<=b>=c!=d",
    'for(int i=0;i<10;++i){printf("%d\\n",i);}', "SELECT * FROM t WHERE a='b' -- comment",
    "if (a && b || !c) { return; }", "#include <stdio.h>",
    "https://example.com/path?q=a%20b&r=1#frag", "user@example.com", "C:\\Users\\me\\file.txt",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE", "$100 €50 £20 ¥1000 ₹500 ₿1",
    '<div class="a">&nbsp;&amp;</div>', '{"key": [1, 2, {"a": null}]}', "!!!???...---***___",
    "~!@#$%^&*()_+`-={}|[]\\:\";'<>?,./",
    "\u201cquotes\u201d \u2018single\u2019 \u00ab guillemets \u00bb", "em\u2014dash en\u2013dash",
    "a/b/c a|b|c", "diff --git a/x b/x\n@@ -1,2 +1,3 @@\n-old\n+new\n", "\\u0041 \\n \\x00",
    # long words
    "a" * 50, "ab" * 40, "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "Donaudampfschifffahrtsgesellschaftskapitän", "z" * 300, "é" * 60, "記" * 60, "!" * 70,
    "-" * 80, "=" * 33 + "\n", "xyz" * 100, "aA" * 30, "0" * 100, "the" * 40,
    "we steer, unreachable steers",
    # words that llama/ has whole, beyond its merges
    " SolidGoldMagikarp", "a SolidGoldMagikarp, SolidGoldMagikarps",
    "Donaudampfschifffahrt Donaudampfschifffahrt", "こんにちは",
    "x" + " " * 32 + "y",
    "こんにちは、こんにちは",
    # "▁", and what looks like a byte token
    "▁", "▁▁", "▁▁▁▁▁▁", "a▁b", "▁Hello▁world", " ▁ ▁", "▁ " * 5, "▁\n▁", "<0x41>", "<0x0A>",
    "<0x0a>", "<0x09>", "<0x00><0xFF>", "a<0x41>b", "<0x4", "0x41>", "<0x411>", "<<0x41>>",
    "Ġ Ġthe Ċ ċ", "ĠĠ", "Â é Ã©",
    # control tokens: real, look-alike, adjacent, overlapping, cut short
    *CONTROL,
    "".join(CONTROL),
    " ".join(CONTROL),
    "\n".join(CONTROL[:12]),
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
    "<|im_start|", "im_start|>", "<|im_start|><|im_start|>", "<<|im_start|>>",
    "<|im_<|im_start|>start|>", "<|IM_START|>", "< |im_start|>", "<|im_start |>",
    "<|endoftext|> <|endoftext|>", "<bos", "bos>", "<b", "os>", "<<bos>>", "<bos><bos>", "< bos >",
    "<BOS>", "<bo<bos>s>", "a<bos>b", "<unused100>", "<unused99>", "<unused>", "<unused0",
    "unused0>", "<unused0><unused1>", "▁<bos>▁", " <bos> ", "\n\n<bos>\n\n", "<h1>Title</h1>",
    "<h1></h1><h2>", "<table><tr>", "[@BOS@", '<tool_call>\n{"name": "f"}\n</tool_call>',
    "<tool_call", "tool_call>", "e\u0301<tool_call>e\u0301", "<|im_start|>\u0301",
    "a<|im_end|>\u0301\u0323", "\u1100<|im_end|>\u1161", "<\u0301|im_start|>",
    "<pad><eos><bos><unk>", "<unk>", "x<unk>y<mask>z", "<eos>\n\n\n<eos>",
    "</s> <s> [INST] [/INST] <<SYS>>",
]
HARD = list(dict.fromkeys(HARD))

# ---------------------------------------------------------------- three tokenizers in three shapes

WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}#| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_SPECIAL = [
    "begin_of_text", "end_of_text",
    *(f"reserved_special_token_{i}" for i in range(2)),
    "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id",
    "eom_id", "eot_id", "python_tag",
    *(f"reserved_special_token_{i}" for i in range(3, 248)),
]


def added(id, content, special=True, **flags):
    return {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special, **flags}


def bpe(vocab, merges, **fields):
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocab, "merges": merges, **fields}


def whole(model, **sections):
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
            "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
            **sections, "model": model}


def split_by(pattern):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {**BYTE_LEVEL, "add_prefix_space": False, "use_regex": False}]}


def template(token, id):
    a, b = ({"Sequence": {"id": which, "type_id": n}} for n, which in enumerate("AB"))
    return {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": token, "type_id": 0}}, a], "pair": [a, b],
            "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
              "use_regex": True}


def train_bytes(pattern, size, normalizer=None):
    """-> vocab, merges (pairs) of a byte-level BPE on TRAINING."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    return model["vocab"], [tuple(m) for m in merges]


def llama():
    """ignore_merges; every way to split a token listed as a merge, as in the published file; some
    words that no merge reaches."""
    pattern = WORDS.replace("#", "{1,3}")
    vocab, _ = train_bytes(pattern, 700)
    for word in ("ĠSolidGoldMagikarp", "Donaudampfschifffahrt", "Ġ" * 31, "ãģĵãĤĵãģ«ãģ¡ãģ¯"):
        vocab[word] = len(vocab)
    merges = []
    for token in sorted(vocab, key=vocab.get):
        pairs = [(token[:n], token[n:]) for n in range(1, len(token))
                 if token[:n] in vocab and token[n:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    special = [f"<|{name}|>" for name in LLAMA_SPECIAL]
    return whole(
        bpe(vocab, [list(m) for m in merges], ignore_merges=True),
        added_tokens=[added(len(vocab) + n, t) for n, t in enumerate(special)],
        pre_tokenizer=split_by(pattern),
        decoder=BYTE_LEVEL,
        post_processor={"type": "Sequence",
                        "processors": [BYTE_LEVEL, template(special[0], len(vocab))]},
    )


def qwen():
    """NFC, single digits, merges as strings, control tokens that are not `special`, no bos; entries
    of the vocabulary that no merge reaches."""
    pattern = WORDS.replace("#", "")
    vocab, merges = train_bytes(pattern, 650, normalizers.NFC())
    for word in ("Ġsteer", "Ġunreachable", "Ġ" * 8):
        vocab.setdefault(word, len(vocab))
    merges = [m for m in merges if "".join(m) != "Ġsteer"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_suffix|>"]
    return whole(
        bpe(vocab, [" ".join(m) for m in merges]),
        added_tokens=[added(len(vocab) + n, t, t in special)
                      for n, t in enumerate(special + plain)],
        normalizer={"type": "NFC"},
        pre_tokenizer=split_by(pattern),
        decoder=BYTE_LEVEL,
        post_processor={**BYTE_LEVEL, "trim_offsets": False},
    )


def gemma():
    """Characters, "▁", byte fallback with "\\t" for "<0x09>"; runs of white space; merges that can
    spell "<bos>", "<0x41>", "<unused0>"."""
    tokenizer = Tokenizer(models.BPE())
    patterns = (r"[\n\t]", r" [^ ]*|[^ ]+", r"<[^>]*>|[\p{L}]+| [\p{L}]*|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns])
    # The trainer's own limit on the alphabet breaks ties by chance.
    counts = Counter("".join(TRAINING))
    kept = sorted(counts, key=lambda c: (-counts[c], c))[:230]
    texts = ["".join(c for c in text if c in kept) for text in TRAINING]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=760, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]["vocab"]
    trained = [t.replace(" ", "▁") for t in sorted(trained, key=trained.get)]
    control = [
        "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]",
        *(f"<unused{n}>" for n in range(12)),
        "<start_of_turn>", "<end_of_turn>",
    ]
    runs = ["\n" * n for n in range(2, 17)] + ["▁" * n for n in range(2, 17)]
    tags = ["<table>", "</table>", "<h1>", "</h1>", "<b>"]
    bytes_ = ["\t" if b == 9 else f"<0x{b:02X}>" for b in range(256)]
    spelled = [
        "<b", "os", "os>", "<0", "x4", "1>", "<0x4", "<0x41>", "<un", "us", "ed", "used",
        "<unused", "0>", "<0x0A>", "<0x", "0A>", "h1", "<h", "</", "h1>", "tab", "le>",
    ]
    pieces = list(dict.fromkeys(
        spelled + [t for t in trained if len(t) > 1] + [t for t in trained if len(t) == 1]
        + ["▁", "\n", "<", ">", "[", "@", "|"]))
    fixed = control + runs + tags + bytes_
    vocab = {t: n for n, t in enumerate(dict.fromkeys(fixed + pieces))}
    # As SentencePiece files are converted: every split of every piece is a merge. The listed pieces
    # go by place, the fixed ones come first, and longest parts come first.
    score = {t: n for n, t in enumerate(pieces)}
    merges = [(t[:n], t[n:]) for t in vocab for n in range(1, len(t))
              if t[:n] in vocab and t[n:] in vocab]
    merges.sort(key=lambda pair: (score.get("".join(pair), -1), -len(pair[0]), -len(pair[1])))
    bytes_alone = {*bytes_} - {"\t"}
    merges = [m for m in merges if not bytes_alone & {*m}]
    plain = control[4:19] + runs + tags
    return whole(
        bpe(vocab, [list(m) for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        added_tokens=sorted((added(vocab[t], t, t not in plain) for t in control + runs + tags),
                            key=lambda token: token["id"]),
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        pre_tokenizer={"type": "Split", "pattern": {"String": " "},
                       "behavior": "MergedWithPrevious", "invert": False},
        post_processor=template("<bos>", vocab["<bos>"]),
        decoder={"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
    )


CONFIGS = {
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen": {"bos_token": None, "eos_token": {"content": "<|im_end|>", "special": True},
             "pad_token": "<|endoftext|>"},
    "gemma": {"bos_token": {"content": "<bos>"}, "eos_token": {"content": "<eos>"},
              "pad_token": {"content": "<pad>"}},
}

# ---------------------------------------------------------------- tiny ones, each for one odd rule


def minis():
    alphabet = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    lone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    letters = {c: n for n, c in enumerate([*"abcdef▁", "<unk>"])}

    def vocab(base, *tokens):
        return base | {t: len(base) + n for n, t in enumerate(tokens)}

    def characters(vocab, merges, added_tokens=(), **fields):
        return whole(
            bpe(vocab, merges, **{"unk_token": "<unk>", **fields}),
            added_tokens=list(added_tokens),
            normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        )

    two_ways = vocab(letters, "ab", "bc", "cd", "abc", "abcd")
    abc = ["abc", "abcd", "aabbcc", "abcabc", "ab abcd", "bcd", "cdab", "abcdabcd"]
    runs = vocab(letters, "aa", "aaa", "aaaa", "ba", "baa")
    unk = vocab(letters, "<0xC3>", "<0xA9>", "ab")
    unknowns = [
        "aéb", "axb", "aãb", "xéxb", "éxyb", "xéxyb", "axéyéz", "é", "xyz", "a😀b", "abxab éab",
    ]
    inner = vocab(letters, "a▁", "▁b", "a▁b", "▁▁")
    e = "e\u0301"
    few = {c: n for n, c in enumerate([*"ab!1²", "Ġ", "Â", "<unk>", "ab", "!!", "Ġa", "11", "Â²"])}
    joins = ["a b", "! !", "Ġ a", "1 1", "Â ²"]
    lost = ["a\x04b", "!\x04!", "\x04", "", "axyb", "a xb", "!\x04\x06!", "é!\x04", "xaxxb",
            "\U00040000", "ab \x04 ab!\x04!", "xy!\x04!! a²b"]
    digits = ["12345", "a1b22", " 1 11  111", "a²²1b", "11!11 ab", "1\U00011de0!",
              "!\U00011de0!", "½1Ⅷ!!"]

    def cuts(*steps):
        return {"type": "Sequence", "pretokenizers": [*steps]}

    def cut_at(pattern):
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                "invert": False}

    def bytes_of_few(*steps, **fields):
        return whole(bpe(few, joins, **fields), pre_tokenizer=cuts(*steps), decoder=BYTE_LEVEL)

    each, runs_of = ({"type": "Digits", "individual_digits": alone} for alone in (True, False))
    bare = {**lone, "use_regex": False}
    digit_runs = bpe(vocab(alphabet, "11", "Ġ1", "111", "a1"), ["1 1", "Ġ 1", "11 1", "a 1"])
    start = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    behind = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    pieces = vocab(letters, *(f"<0x{b:02X}>" for b in range(256)), "▁a", "ab", "▁ab", "▁▁", "<s>")
    return {
        "one result, two pairs, the reachable one listed last": (
            characters(two_ways, ["b c", "a bc", "ab c", "a b", "c d", "abc d", "ab cd"]),
            abc,
        ),
        "one result, two pairs, the reachable one listed first": (
            characters(two_ways, ["a b", "c d", "ab c", "ab cd", "b c", "a bc", "abc d"]),
            abc,
        ),
        "a merge that never comes about": (characters(two_ways, ["b c", "a b", "ab c"]), abc),
        "a merge listed twice counts from its last place": (
            characters(two_ways, ["a b", "b c", "a b", "a bc"]),
            abc,
        ),
        "a part listed again after its result": (
            characters(vocab(letters, "ba", "bab", "babab"), ["b a", "ba b", "ba bab", "b a"]),
            ["babab", "bababab", "ba bab"],
        ),
        "parts listed after their result": (
            characters(two_ways, ["abc d", "ab c", "a b", "b c", "c d"]),
            abc,
        ),
        "of equal merges the leftmost first": (
            characters(runs, ["a a", "aa a", "aa aa", "b a", "b aa", "ba a"]),
            ["a" * n for n in range(2, 12)] + ["ba", "baa", "baaa", "aabaaab"],
        ),
        "long runs before short ones": (
            characters(runs, ["aaa a", "aa aa", "aa a", "a aa", "a a"]),
            ["a" * n for n in range(2, 14)],
        ),
        "tokens across words": (
            characters(inner, ["a ▁", "▁ b", "a▁ b", "▁ ▁"]),
            ["a b", "a  b", "b a b a", "a b a b", " b a ", "aa bb", "a   b"],
        ),
        "unk, fused": (characters(unk, ["a b"], byte_fallback=True, fuse_unk=True), unknowns),
        "unk, each": (characters(unk, ["a b"], byte_fallback=True), unknowns),
        "unk, no byte fallback": (characters(unk, ["a b"], fuse_unk=True), unknowns),
        "ordinary text among the added tokens": (
            characters(
                vocab(letters, "▁▁", "\n\n", "▁▁▁"),
                [],
                [added(8, "▁▁", False), added(9, "\n\n", False), added(10, "▁▁▁")],
            ),
            ["a▁▁b", "a▁▁▁b", "▁▁▁▁", "a\n\nb", "\n\n\n"],
        ),
        "a single character that is a control token": (
            characters(
                vocab(letters, "<0x61>", "ab"), ["a b"], [added(0, "a")], byte_fallback=True
            ),
            ["abc", "cab"],
        ),
        "ByteLevel alone is GPT-2's pattern": (
            whole(
                bpe(vocab(alphabet, "Ġa", "ab", "Ġab"), ["Ġ a", "a b", "Ġa b"]),
                pre_tokenizer=lone,
                decoder=BYTE_LEVEL,
            ),
            ["ab ab", " ab  ab's 12ab 1234", "a b\n\n ab", "AB'S ab's", "ab\tab \t ab"],
        ),
        "a space in front": (
            whole(
                bpe(vocab(alphabet, "Ġa", "ab", "Ġab"), ["Ġ a", "a b", "Ġa b"]),
                pre_tokenizer={**lone, "add_prefix_space": True},
                added_tokens=[added(259, "<x>")],
                decoder=BYTE_LEVEL,
            ),
            ["ab", " ab", "\nab", "ab<x>ab", "<x> ab", ""],
        ),
        "no pattern at all": (
            whole(
                bpe(vocab(alphabet, "Ġa", "aĠ", "aĠa"), ["a Ġ", "aĠ a", "Ġ a"]),
                pre_tokenizer={**lone, "use_regex": False},
            ),
            ["a a a", " a", "aa  a\n"],
        ),
        "a pattern with gaps": (
            whole(
                bpe(vocab(alphabet, "aa", "bb", "aab"), ["a a", "b b", "aa b"]),
                pre_tokenizer=split_by("a+"),
            ),
            ["aabb", "bbaab", "caabbc aa", "bb\nbb"],
        ),
        "a string for a pattern": (
            whole(
                bpe(vocab(alphabet, ".a", "aa"), [". a", "a a"]),
                pre_tokenizer={"type": "Sequence", "pretokenizers": [
                    {"type": "Split", "pattern": {"String": "."}, "behavior": "Isolated",
                     "invert": False}, {**lone, "use_regex": False}]},
            ),
            ["a.aa..a", ".a", "aaa"],
        ),
        "longest added token first, leftmost before longest": (
            characters(
                letters, [], [added(8, "ab"), added(9, "bcd"), added(10, "abc"), added(0, "a")]
            ),
            ["abcd", "abab", "bcda", "xabcdab", "aabcab"],
        ),
        "normalized added tokens": (
            whole(
                bpe(vocab(alphabet, "Ã©"), ["Ã ©"]),
                normalizer={"type": "NFC"},
                pre_tokenizer=lone,
                decoder=BYTE_LEVEL,
                added_tokens=[
                    added(257, f"<{e}>", normalized=True),
                    added(258, "<\u00e9\u00e9>"),
                    added(259, "<!>", False, normalized=True),
                ],
            ),
            [f"<{e}>", "<\u00e9>", f"<{e}{e}>", "<\u00e9\u00e9>", f"{e}<!>{e}", f"<<{e}>>"],
        ),
        "a byte that is missing is dropped, and its neighbours meet": (bytes_of_few(lone), lost),
        "a byte that is missing is unk": (bytes_of_few(lone, unk_token="<unk>"), lost),
        "missing bytes that are neighbours are one unk, inside a word": (
            bytes_of_few(lone, unk_token="<unk>", fuse_unk=True),
            lost,
        ),
        "a word that is whole only without its missing byte is not whole": (
            whole(
                bpe(vocab(few, "ab!", "ba"), joins, ignore_merges=True),
                pre_tokenizer=bare,
                decoder=BYTE_LEVEL,
            ),
            ["ab!", "a\x04b!", "ba", "b\x04a", "baab"],
        ),
        "each digit alone, missing bytes": (bytes_of_few(each, lone), digits + lost),
        "runs of digits, missing bytes": (bytes_of_few(runs_of, lone), digits + lost),
        "each digit alone": (
            whole(digit_runs, pre_tokenizer=cuts(each, lone), decoder=BYTE_LEVEL),
            digits,
        ),
        "runs of digits": (
            whole(digit_runs, pre_tokenizer=cuts(runs_of, bare), decoder=BYTE_LEVEL),
            digits,
        ),
        "two patterns, then digits": (
            whole(
                digit_runs,
                pre_tokenizer=cuts(cut_at("[\n!]"), cut_at(r" ?\p{L}+$|\s+"), each, bare),
                decoder=BYTE_LEVEL,
            ),
            ["a1!11\n1", "ab\nab 11", "11 a\n!a1", "a  1 é1", *digits],
        ),
        "digits, then a pattern, then GPT-2's": (
            whole(digit_runs, pre_tokenizer=cuts(runs_of, cut_at("a1|1a|a"), lone),
                  decoder=BYTE_LEVEL),
            ["a1a1 11a", " a 1 1a111", *digits],
        ),
        **{f"a space of its own in front, normalized {late}": (
            whole(
                bpe(pieces, ["▁ a", "a b", "▁ ab", "▁ ▁"], unk_token="<unk>", fuse_unk=True,
                    byte_fallback=True),
                normalizer=start, decoder=behind, post_processor=template("<s>", pieces["<s>"]),
                added_tokens=[added(7, "<unk>"), added(pieces["<s>"], "<s>", normalized=late)],
            ),
            ["ab", " ab", "  ab ab", "", " ", "é☕ab", "ab<unk>ab", "<unk> ab", "<s>ab", "ab<s>ab",
             "ab <s> ab", "▁ab"],
        ) for late in (True, False)},
        "a control token that is a word of the vocabulary": (
            whole(
                bpe(vocab(alphabet, "ab", "abcd", "Ġabcd"), ["a b"], ignore_merges=True),
                pre_tokenizer=lone,
                added_tokens=[added(257, "abcd", False)],
            ),
            ["abcd", " abcd", "xabcd abcd", "ab abcd"],
        ),
    }


# ----------------------------------------------------------------------------------------- answers


def as_plain_text(spec):
    """The same file with its control tokens taken out: from the list of added tokens, and from what
    merges and whole words can make."""
    model = spec["model"]
    ordinary = [t for t in spec["added_tokens"]
                if not t["special"] and t["content"] in model["vocab"]
                and t["content"].replace("▁", " ").isspace()]
    control = {t["content"] for t in spec["added_tokens"] if t not in ordinary}
    if model["byte_fallback"]:
        control |= {f"<0x{b:02X}>" for b in range(256)}
    merges = []
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not control & {*pair, "".join(pair)}:
            merges.append(merge)
    vocab = {t: n for t, n in model["vocab"].items()
             if not (t in control and (model["ignore_merges"] or len(t) == 1))}
    return {**spec, "added_tokens": ordinary, "model": {**model, "merges": merges, "vocab": vocab}}


def answers(spec, texts):
    """The ids of all texts. The ids as plain text, by place, where they differ from the ids without
    what the template adds. The decoded texts, by place, where they are not the texts."""
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    plain = Tokenizer.from_str(json.dumps(as_plain_text(spec)))
    ids = [tokenizer.encode(t).ids for t in texts]
    bare = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    plain = [plain.encode(t, add_special_tokens=False).ids for t in texts]
    decoded = [tokenizer.decode(i, skip_special_tokens=False) for i in bare]
    return {
        "ids": ids,
        "plain": {n: p for n, (p, b) in enumerate(zip(plain, bare)) if p != b},
        "decoded": {n: d for n, (d, t) in enumerate(zip(decoded, texts)) if d != t},
    }


def write(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")
    print(f"{path.stat().st_size:8,d} bytes  {path}")


def main():
    made_with = {"python": platform.python_version(), "tokenizers": tokenizers.__version__,
                 "unicodedata": unicodedata.unidata_version}
    golden = {"made_with": made_with, "texts": HARD}
    for name, make in (("llama", llama), ("qwen", qwen), ("gemma", gemma)):
        spec = make()
        write(HERE / name / "tokenizer.json", spec)
        write(HERE / name / "tokenizer_config.json", CONFIGS[name])
        golden[name] = answers(spec, HARD)
    for name in REAL if SHARED.is_dir() else ():
        spec = json.loads((SHARED / name / "tokenizer.json").read_text("utf-8"))
        golden[name] = answers(spec, HARD)
    write(HERE / "golden.json", golden)
    written = [{"name": name, "spec": spec, "texts": texts, **answers(spec, texts)}
               for name, (spec, texts) in minis().items()]
    write(HERE / "minis.json", {"made_with": made_with, "minis": written})


if __name__ == "__main__":
    main()
