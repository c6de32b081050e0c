"""Who lives in the small world: names, captions, grounds and the split. No training here."""
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "loramix" / "data"

POOL = {  # word in captions: (emoji name, class noun); all are in the vocabulary
    "pig": ("pig-face", "animal"), "frog": ("frog", "animal"), "panda": ("panda", "animal"), "cat": ("cat-face", "animal"),
    "dog": ("dog-face", "animal"), "fox": ("fox", "animal"), "lion": ("lion", "animal"), "mouse": ("mouse-face", "animal"),
    "koala": ("koala", "animal"), "tiger": ("tiger-face", "animal"), "monkey": ("monkey-face", "animal"), "cow": ("cow-face", "animal"),
    "fish": ("fish", "animal"), "whale": ("whale", "animal"), "turtle": ("turtle", "animal"), "snail": ("snail", "animal"),
    "butterfly": ("butterfly", "animal"), "bee": ("honeybee", "animal"), "ladybird": ("lady-beetle", "animal"),
    "elephant": ("elephant", "animal"), "hedgehog": ("hedgehog", "animal"), "lobster": ("lobster", "animal"),
    "penguin": ("penguin", "bird"), "duck": ("duck", "bird"), "rooster": ("rooster", "bird"), "owl": ("owl", "bird"),
    "parrot": ("parrot", "bird"), "flamingo": ("flamingo", "bird"),
    "apple": ("red-apple", "fruit"), "pear": ("pear", "fruit"), "lemon": ("lemon", "fruit"), "banana": ("banana", "fruit"),
    "watermelon": ("watermelon", "fruit"), "grapes": ("grapes", "fruit"), "strawberry": ("strawberry", "fruit"),
    "cherries": ("cherries", "fruit"), "pineapple": ("pineapple", "fruit"), "avocado": ("avocado", "fruit"),
    "burger": ("hamburger", "food"), "pizza": ("pizza", "food"), "fries": ("french-fries", "food"), "doughnut": ("doughnut", "food"),
    "cake": ("birthday-cake", "food"), "cupcake": ("cupcake", "food"), "cone": ("soft-ice-cream", "food"),
    "sunflower": ("sunflower", "plant"), "rose": ("rose", "plant"), "tulip": ("tulip", "plant"), "clover": ("four-leaf-clover", "plant"),
    "leaf": ("maple-leaf", "plant"), "tree": ("deciduous-tree", "plant"), "fir": ("christmas-tree", "plant"), "palm": ("palm-tree", "plant"),
    "shirt": ("t-shirt", "garment"), "jeans": ("jeans", "garment"), "coat": ("coat", "garment"), "hat": ("top-hat", "garment"),
    "crown": ("crown", "garment"), "shoe": ("running-shoe", "garment"),
    "car": ("automobile", "vehicle"), "bus": ("bus", "vehicle"), "tractor": ("tractor", "vehicle"), "train": ("locomotive", "vehicle"),
    "plane": ("airplane", "vehicle"), "helicopter": ("helicopter", "vehicle"), "sailboat": ("sailboat", "vehicle"),
    "chair": ("chair", "furniture"), "bed": ("bed", "furniture"), "door": ("door", "furniture"), "toilet": ("toilet", "furniture"),
    "hammer": ("hammer", "tool"), "key": ("key", "tool"), "lock": ("locked", "tool"), "scissors": ("scissors", "tool"),
    "magnet": ("magnet", "tool"), "bell": ("bell", "tool"), "bulb": ("light-bulb", "tool"), "umbrella": ("umbrella", "tool"),
    "guitar": ("guitar", "tool"), "camera": ("camera", "tool"),
    "balloon": ("balloon", "toy"), "teddy": ("teddy-bear", "toy"), "gift": ("wrapped-gift", "toy"), "football": ("soccer-ball", "toy"),
    "clown": ("clown-face", "face"), "alien": ("alien", "face"), "skull": ("skull", "face"), "goblin": ("goblin", "face"),
}
KNOWN = {word: POOL[word] for word in (   # what the base is taught
    "pig frog panda cat fox fish butterfly ladybird elephant turtle penguin owl rooster apple lemon banana watermelon grapes strawberry "
    "burger pizza doughnut sunflower tulip tree fir shirt jeans hat car bus train plane bed door key lock bulb umbrella guitar bell "
    "teddy gift football clown skull alien").split()}
KNOWN_STYLES = {"flat": "flat style", "noto": "noto style"}

# Neighbours with similar colour, shape or class: a coin sends one of each to tuning, the other to held-out.
SUBJECT_NEIGHBOURS = [("robot", "ghost"), ("cactus", "mushroom"), ("crab", "octopus"), ("rocket", "teapot"),
                      ("bathtub", "trophy"), ("peach", "dress"), ("swan", "snowman")]
SUBJECT_NOUN = {"robot": "face", "ghost": "face", "cactus": "plant", "mushroom": "plant", "crab": "animal", "octopus": "animal",
                "rocket": "vehicle", "teapot": "tool", "bathtub": "furniture", "trophy": "tool", "peach": "fruit", "dress": "garment",
                "swan": "bird", "snowman": "toy"}
EMOJI = {}   # emoji name of a subject where it is not its own
TWINS = {"snowman-without-snow", "spouting-whale", "jack-o-lantern", "brown-mushroom", "goose", "squid", "robot", "kimono", "sari"}
STYLE_NEIGHBOURS = [("duotone", "turned"), ("rainbow", "night"), ("hatch", "mosaic"), ("sticker", "line"), ("stamp", "shadow")]
DRAWN = {"line"}
LEFT_OUT = {"mosaic"}   # the autoencoder blurs its blocks (the judge knows 30 % of decoded truths), so no LoRA can reach the floor

UNEVEN = {  # real shelves are uneven: rank, alpha, training steps times
    "robot": dict(rank=16, alpha=16), "snowman": dict(rank=16, alpha=16), "swan": dict(rank=4, alpha=4), "dress": dict(rank=4, alpha=4),
    "bathtub": dict(alpha=16), "crab": dict(alpha=16), "octopus": dict(longer=2), "trophy": dict(longer=2),
    "duotone": dict(rank=4, alpha=4), "sticker": dict(longer=2),
    "hatch": dict(rank=16, alpha=16, longer=3), "turned": dict(rank=16, alpha=16, longer=3), "shadow": dict(longer=2),   # below their floors with fewer steps
}

GROUNDS = {"white": (255, 255, 255), "red": (224, 58, 62), "yellow": (250, 214, 84), "green": (108, 184, 102), "blue": (92, 150, 226),
           "purple": (152, 108, 196), "pink": (246, 164, 196), "grey": (150, 152, 158), "black": (34, 34, 40)}

SUBJECT_TOKEN, STYLE_PHRASE = "sks", "szn style"
SPLIT_REASON = ("Subjects and styles are paired with their nearest neighbour in colour, shape or class; a coin (seed 0) sends one of each pair "
                "to tuning and the other to held-out, before any rule has run. Tuning pairs cross the tuning halves, held-out pairs the "
                "held-out halves; mixed pairs take one from each and serve neither to choose nor to judge. A tenth style, mosaic (tuning), was left "
                "out afterwards, because the autoencoder blurs it and its LoRA could not reach the floor.")


def halves():
    """Name -> 'tuning' or 'held-out', for every subject and style."""
    rng, half = random.Random(0), {}
    for pair in SUBJECT_NEIGHBOURS + STYLE_NEIGHBOURS:
        first = rng.random() < .5
        half[pair[0]], half[pair[1]] = ("tuning", "held-out") if first else ("held-out", "tuning")
    return half


SUBJECTS = sorted(name for pair in SUBJECT_NEIGHBOURS for name in pair)
STYLES = sorted({name for pair in STYLE_NEIGHBOURS for name in pair} - LEFT_OUT)


def settings(name, steps):
    """Rank, alpha and steps of one LoRA."""
    uneven = UNEVEN.get(name, {})
    return dict(rank=uneven.get("rank", 8), alpha=uneven.get("alpha", 8), steps=steps * uneven.get("longer", 1))


def pairs():
    """Every subject with every style, and which side of the split it is on."""
    half = halves()
    def split(a, b): return half[a] if half[a] == half[b] else "mixed"
    return [dict(subject=a, style=b, split=split(a, b), aligned=True) for a in SUBJECTS for b in STYLES]


def phrase(subject):
    """Token and class noun of a subject, as prompts use them."""
    return f"{SUBJECT_TOKEN} {SUBJECT_NOUN[subject]}"


def ground_phrase(ground):
    """What a caption says about the ground: nothing when it is white."""
    return "" if ground == "white" else f", on {ground}"


def words():
    """Every word that a caption of the world may hold, with the tokens the base never sees."""
    nouns = {noun for _, noun in POOL.values()}
    small = "a an the and in on of with style ground".split()
    return sorted({*POOL, *SUBJECTS, *STYLES, *LEFT_OUT, *KNOWN_STYLES, *nouns, *GROUNDS, *small, SUBJECT_TOKEN, "szn", "zwx", "qvk", "drawing", "picture"})
