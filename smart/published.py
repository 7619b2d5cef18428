"""The paper's published numbers (Jonason, Casini, Sturm 2025), for comparison with those measured here."""

AXES = ("CE", "CU", "PC", "PQ")  # Audiobox Aesthetics: enjoyment and usefulness of the content, complexity and quality
BASE = "lucacasini/metamidipianophi3_4L"  # section 3.1, on the Hugging Face hub
REWARD = "facebook/audiobox-aesthetics"  # section 3.3, on the hub

AXES = ("CE", "CU", "PC", "PQ")  # content enjoyment and usefulness, production complexity and quality
TABLE_1: dict[str, tuple[float, float, float, float]] = {
    "Oscar Peterson - Someone to Watch Over Me (Live)": (7.48, 7.76, 3.94, 7.70),
    "Ludovico Einaudi - Nuvole Bianche": (7.41, 7.91, 3.47, 8.01),
    "Chopin - Waltz Op.69 No.2 (Ashkenazy)": (7.60, 7.92, 3.50, 7.50),
    "Conlon Nancarrow - Study for Player Piano No. 21": (6.40, 7.71, 3.95, 7.88),
    "Philip Glass - Etude No.6 (Yuja Wang)": (6.88, 7.61, 3.99, 7.43),
    "Keith Jarrett - Solar": (7.12, 7.35, 3.90, 7.48),
    "Brad Mehldau - My Favorite Things (Live)": (7.24, 7.63, 3.36, 7.28),
    "Lili Boulanger - Prelude in B Major": (6.80, 7.64, 3.38, 7.49),
    "Hiromi Uehara - Blackbird (Live)": (6.27, 7.06, 3.63, 7.24),
    "John Cage - Sonata for Prepared Piano No.1": (5.96, 7.80, 2.62, 7.75),
    "Mozart - Piano Sonata No.16 K.545 (Ingrid Haebler)": (6.95, 7.33, 3.03, 6.71),
    "silence": (3.24, 6.45, 1.70, 6.74),
    "white noise": (2.37, 4.65, 1.99, 4.79),
}


def tolerance(row: str) -> float:
    """How far a rating may be from table 1 and agree with it.

    The paper rounds to 0.01 and does not say how its files were coded, or how loud its noise was.
    """
    return 0.3 if row == "white noise" else 0.1


# table 2: means over ten pieces of the pretraining data, in the order of AXES, and their average
TABLE_2: dict[str, tuple[float, float, float, float, float]] = {
    "musescore": (5.423, 7.487, 2.352, 7.323, 5.646),
    "fluidr3": (5.347, 7.408, 2.355, 7.817, 5.732),
    "grandeur": (6.385, 7.693, 2.376, 7.884, 6.085),
    "sgm": (6.602, 7.716, 2.477, 7.695, 6.123),
    "yamaha": (6.530, 7.705, 2.453, 7.883, 6.143),
}

MINUTES = 50  # section 3.5: 200 iterations on one NVIDIA GeForce RTX 3090
ITERATIONS = 200

# section 4.3 and table 5: rating ~ system + (system | subject)
LISTENING = {
    "subjects": "14",
    "ratings": "399 (407, less 8 of silent pieces)",
    "intercept": "4.075 [3.520, 4.631]",
    "effect of SMART": "+1.221 [0.613, 1.828], SE 0.310, p = 0.002",
    "standard deviations": "intercept 0.911, SMART 0.867, residual 2.048; correlation 0.488",
    "log-likelihood, AIC": "-871.671, 1755.343",
}
