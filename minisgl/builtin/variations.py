"""A question in other words, by rule, so that the model knows it however somebody types it."""

import re
from collections.abc import Callable, Mapping
from random import Random

from minisgl.builtin.corpus import normalise

# ruff's formatter would give each of these phrases a line of its own
# fmt: off
_TOPIC = (  # for an X of at most four words
    r"what is \1?", r"what's \1?", r"whats \1", r"what are \1?", r"what exactly is \1?",
    r"explain \1", r"explain what \1 is", r"define \1", r"describe \1", r"tell me about \1", r"\1?",
    r"what does \1 mean?", r"\1 meaning", r"\1 explained", r"meaning of \1", r"what is meant by \1?",
    r"what do you know about \1?", r"I want to know what \1 is", r"help me understand \1",
)
_HOW_TO = (
    r"how do I \1", r"how can I \1", r"how do you \1", r"how to \1", r"how would I \1", r"how should I \1",
    r"what is the way to \1", r"I want to \1", r"is there a way to \1", r"what must I do to \1", r"can I \1",
)
_HOW_WORKS = (r"how does \1 work?", r"explain how \1 works", r"how \1 works", r"what is the idea of \1?")
_VERSUS = (
    r"\1 vs \2", r"\1 or \2?", r"\1 versus \2", r"compare \1 with \2", r"difference between \1 and \2",
    r"what is the difference between \1 and \2?", r"how does \1 differ from \2?",
)
_X = r"(?:an? |the )?((?:[^\s?.]+ ?){1,4})[?.]*"
_REWRITES = tuple((re.compile(pattern, re.IGNORECASE), forms) for pattern, forms in (
    (rf"(?:what is|what's|what are|define|describe|tell me about|explain (?!how|why|what)) ?{_X}", _TOPIC),
    (r"how (?:do|can) (?:i|you) (.+)", _HOW_TO),
    (r"how (?:does|do) (.+) work\?", _HOW_WORKS),
    (r"(\S+(?: \S+)?) vs\.? (.+)", _VERSUS),
    (r"what is the difference between (.+) and (.+)\?", _VERSUS),
))
_WORDS = {
    "explain": "describe", "several": "multiple", "big": "large", "fast": "quick", "start": "launch",
    "need": "require", "without": "w/o", "and": "&", "you": "u", "your": "ur", "are": "r", "with": "w/",
    "gpu": "graphics card", "gpus": "graphics cards", "show": "display", "what": "wat", "run": "execute",
    "request": "query", "prompt": "input", "llm": "language model", "how": "how exactly",
}
_FILLERS = {"the", "a", "an", "so", "just", "actually", "exactly", "really", "please", "do", "does", "is"}
_GREETINGS = (
    "hi, ", "hello, ", "hey, ", "Hi! ", "Hello! ", "Hey there, ", "ok, ", "okay, so ", "so ", "and ",
    "well, ", "thanks! ", "Great, thanks. ", "one more question: ", "quick question: ", "now ", "hmm, ",
)
_ASKING = (
    "can you tell me ", "could you tell me ", "please tell me ", "tell me, ", "do you know ", "I wonder, ",
    "I'd like to know ", "please explain: ", "can you explain ", "say, ", "I want to know ", "remind me, ",
)
_ORDERING = ("please ", "can you ", "could you ", "could you please ", "would you ", "pls ")
_ENDINGS = (" please", ", please?", " thanks", ", thanks!", " thank you", " pls?", " in short", " briefly")
_MARKS = ("", "", "", "?", "?", ".", "!", "??", " ?", "...", "?!")
_CASES = (*6 * (str.lower,), *3 * (str.capitalize,), str.upper, str.title)
# fmt: on
_QUESTION = re.compile(r"(what|why|how|which|where|when|who)\b", re.IGNORECASE)
_ORDER = re.compile(r"(explain|tell|give|list|show|compare|describe|define|serve|run|start)\b", re.IGNORECASE)


def vary(question: str, rng: Random) -> str:
    """`question` in another form with the same answer, or now and then as it stands."""
    text = question
    for step, chance in _STEPS:
        if rng.random() < chance:
            text = step(text, rng)
    return text.strip() or question


def vary_safely(question: str, owners: Mapping[str, str], rng: Random) -> str:
    """A variation that no other entry's question equals; `owners` as `corpus.owners` gives them."""
    return _safe(vary(question, rng), question, owners)


def cross_safely(question: str, other: str, owners: Mapping[str, str], rng: Random) -> str:
    """The beginning of one question and the end of `other`, one of the same answer, at times varied. Seldom
    a sentence; but whoever learns to answer it has learned which words matter."""
    words, more, at = question.split(), other.split(), rng.random()
    crossed = words[: round(at * len(words))] + more[round(at * len(more)) :]
    text = " ".join(crossed) if len(crossed) >= 4 else question  # two words left may be another's
    return _safe(vary(text, rng) if rng.random() < 0.5 else text, question, owners)


def _safe(varied: str, question: str, owners: Mapping[str, str]) -> str:
    key = owners[normalise(question)]
    return varied if owners.get(normalise(varied), key) == key else question


def _rewrite(text: str, rng: Random) -> str:
    for pattern, forms in _REWRITES:
        if match := pattern.fullmatch(text):
            return match.expand(rng.choice(forms))
    return text


def _reword(text: str, rng: Random) -> str:
    """One of the words that have another for it is replaced."""
    words = text.split(" ")
    if known := [i for i, word in enumerate(words) if word.lower() in _WORDS]:
        i = rng.choice(known)
        words[i] = _WORDS[words[i].lower()]
    return " ".join(words)


def _shorten(text: str, rng: Random) -> str:
    """Words that carry little are left out, where enough stay."""
    words = [word for word in text.split(" ") if word.lower() not in _FILLERS or rng.random() < 0.3]
    return " ".join(words) if len(words) >= 3 else text


def _forget(text: str, rng: Random) -> str:
    """Any one word of a long question is left out: it should not hang on one."""
    words = text.split(" ")
    if len(words) >= 6:
        del words[rng.randrange(len(words))]
    return " ".join(words)


def _be_polite(text: str, rng: Random) -> str:
    if len(text.split()) < 3:  # "hi, thanks" would be a greeting and a thank-you at once
        return text
    if rng.random() < 0.6:
        if not text[1:2].isupper() and not text.startswith(("I ", "I'")):  # a name stays as it is
            text = text[0].lower() + text[1:]
        openings = _ASKING if _QUESTION.match(text) else _ORDERING if _ORDER.match(text) else _GREETINGS
        text = rng.choice(openings) + text
    if rng.random() < 0.3:
        text = rng.choice(_GREETINGS) + text
    return text.rstrip("?.!") + rng.choice(_ENDINGS) if rng.random() < 0.3 else text


def _punctuate(text: str, rng: Random) -> str:
    """Other marks at the end; within words, a hyphen, underscore or apostrophe may go."""
    if rng.random() < 0.3:
        text = re.sub(r"(?<=\w)['_-](?=\w)", lambda mark: "" if mark[0] == "'" else rng.choice(" -_"), text)
    return text.rstrip("?.! ") + rng.choice(_MARKS)


def _recase(text: str, rng: Random) -> str:
    return rng.choice(_CASES)(text)


def _mistype(text: str, rng: Random) -> str:
    """A slip in one word of four letters or more: two swapped, or one dropped, doubled or wrong."""
    words = text.split(" ")
    if long := [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha()]:
        i = rng.choice(long)
        at = rng.randrange(len(words[i]) - 1)
        one, two = words[i][at], words[i][at + 1]
        slip = rng.choice((two + one, one, one + one + two, rng.choice("aeiourstnl") + two))
        words[i] = words[i][:at] + slip + words[i][at + 2 :]
    return " ".join(words)


_STEPS: tuple[tuple[Callable[[str, Random], str], float], ...] = (
    *((_rewrite, 0.3), (_reword, 0.12), (_shorten, 0.15), (_forget, 0.15), (_be_polite, 0.25)),
    *((_punctuate, 0.4), (_recase, 0.45), (_mistype, 0.15), (_mistype, 0.05)),
)
