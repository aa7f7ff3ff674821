"""Makes rouge.json.gz: stems of words and ROUGE-L of texts by rouge_score 0.1.2 (with NLTK 3.10.4), Python 3.11.

    pip install rouge_score==0.1.2 nltk==3.10.4
    python tests/golden/make_rouge.py

    {"stems": {word: stem}, "scores": [[answer, [references], rougeL]]}

Words are roots with the endings that rules name, most of them no words of a language, and the words of TEXTS. A score
is the highest F-measure over the references of RougeScorer(["rougeL"], use_stemmer=True), as in Tk-Instruct.
"""

import gzip
import itertools
import json
import re
from pathlib import Path

from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer

FILE = Path(__file__).parent / "rouge.json.gz"
ROOTS = (
    "a", "be", "ca", "hop", "hopp", "fall", "hiss", "fizz", "fil", "fail", "snow", "box", "play", "tr", "sk", "happ",
    "enjo", "relat", "condit", "rat", "val", "hesit", "digit", "conform", "radic", "differ", "vil", "analog", "vietnam",
    "predic", "oper", "feud", "decis", "hope", "call", "form", "sens", "triplic", "electr", "good", "reviv", "allow",
    "infer", "airlin", "gyroscop", "adjust", "defens", "irrit", "replac", "depend", "adopt", "homolog", "commun",
    "activ", "angul", "effect", "bowdler", "prob", "ceas", "control", "roll", "syzyg", "yyy", "trouble", "oats", "siz",
    "conflat", "tan", "agre", "be", "emiss", "quest", "archaeo", "theo", "fu", "logic", "ab", "pony", "x1", "19",
)  # fmt: skip
ENDINGS = (
    "", "s", "es", "ies", "sses", "ss", "ed", "eed", "ied", "ing", "ying", "y", "ily", "ational", "tional", "enci",
    "anci", "izer", "bli", "abli", "alli", "entli", "eli", "ousli", "ization", "ation", "ator", "alism", "iveness",
    "fulness", "ousness", "aliti", "iviti", "biliti", "fulli", "logi", "icate", "ative", "alize", "iciti", "ical",
    "ful", "ness", "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "sion",
    "tion", "ou", "ism", "ate", "iti", "ous", "ive", "ize", "e", "le", "ll", "ating", "bling", "izing", "ally", "ously",
)  # fmt: skip
TEXTS = (
    "The cats were running over the bridges, happily.", "A cat runs happily over a bridge!", "yes", "Yes.", "no", "",
    "The answer is 12 apples", "12 apples", "naïve café owners", "An organization's generalizations are questionable",
    "general organizers question it", "the the the cat", "the cat the cat the cat", "sky skies dying news innings",
    "It is raining; skies are grey and the news is dying down.", "proceed to the succeeding step, exceed it",
    "!!! ???", "A\nB\tc  d", "flies fly flying tied ties tying", "controlling controlled control rolls rolling",
)  # fmt: skip


def main() -> None:
    stemmer = PorterStemmer()
    made = {root + ending for root, ending in itertools.product(ROOTS, ENDINGS)}
    words = made | {word for text in TEXTS for word in re.findall("[a-z0-9]+", text.lower())}
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores = []
    for number, answer in enumerate(TEXTS):
        for shift in range(1, len(TEXTS), 3):
            references = [TEXTS[(number + shift) % len(TEXTS)], TEXTS[(number + 2 * shift) % len(TEXTS)]]
            best = max(scorer.score(target=each, prediction=answer)["rougeL"].fmeasure for each in references)
            scores.append([answer, references, best])
    found = {"stems": {word: stemmer.stem(word) for word in sorted(words) if len(word) > 3}, "scores": scores}
    FILE.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))
    print(len(found["stems"]), len(scores), max(score for *_, score in scores))


if __name__ == "__main__":
    main()
