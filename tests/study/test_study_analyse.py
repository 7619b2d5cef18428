"""Analysis of a listening study: mixed models against published fits, dense algebra, statsmodels and simulation."""

import csv
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from published_data import DYESTUFF, DYESTUFF2, PENICILLIN, SLEEPSTUDY, WINE
from scipy import optimize, stats

from smart import UserError
from smart.intervals import Estimate
from smart.study import analyse, mixed, power, ratings
from smart.study.command import main
from smart.study.mixed import Problem, Term, fit, profile_interval
from smart.study.ordinal import Likelihood, fit_ordinal
from smart.study.summary import Outcome


def grouped(name: str, groups: np.ndarray, *columns: np.ndarray) -> Term:
    return Term(name, tuple(f"column {number}" for number in range(len(columns))), groups, np.stack(columns, axis=1))


def sleepstudy() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    days = np.tile(np.arange(10.0), 18)
    return SLEEPSTUDY.ravel(), np.stack([np.ones(180), days], axis=1), np.repeat(np.arange(18), 10)


# --- Published fits -----------------------------------------------------------------------------------------------


def test_sleepstudy_with_correlated_slopes_as_lme4_and_lmertest_print_it() -> None:
    """Reaction ~ Days + (Days | Subject): Bates et al. 2015; Kuznetsova et al. 2017; confint of lme4."""
    y, x, subject = sleepstudy()
    fitted = fit(y, x, [Term("Subject", ("Intercept", "Days"), subject, x)])
    assert [f"{value:.3f}" for value in fitted.beta] == ["251.405", "10.467"]
    assert [f"{value:.3f}" for value in fitted.errors] == ["6.825", "1.546"]
    assert fitted.df == pytest.approx([17, 17], abs=1e-3)
    assert [f"{value:.2f}" for value in fitted.beta / fitted.errors] == ["36.84", "6.77"]
    assert fitted.p_values[1] == pytest.approx(3.264e-6, rel=1e-3)
    covariance = fitted.variances[0]
    assert f"{covariance[1, 1]:.2f}" == "35.07" and f"{fitted.sigma2:.2f}" == "654.94"
    assert f"{covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]):.3f}" == "0.066"
    assert f"{fitted.criterion:.3f}" == "1743.628" and f"{fitted.log_likelihood:.3f}" == "-871.814"
    assert fitted.parameters == 6 and fitted.aic == pytest.approx(1743.628 + 12, abs=1e-3)
    # every subject has the same days, so the optimum is known in closed form; lme4's optimiser stopped at 612.10
    own = np.linalg.lstsq(x[:10], SLEEPSTUDY.T, rcond=None)[0]
    assert covariance == pytest.approx(np.cov(own) - fitted.sigma2 * np.linalg.inv(x[:10].T @ x[:10]), rel=5e-6)
    assert covariance[0, 0] == pytest.approx(612.10, abs=0.02)
    published = np.array([0.96674177, 0.01516906, 0.23090995])  # lme4's theta
    assert fitted.theta == pytest.approx(published, abs=2e-5)
    assert fitted.criterion <= fitted.problem.criterion(published) < fitted.criterion + 1e-5
    assert not fitted.singular
    assert profile_interval(fitted, 0) == pytest.approx([237.6807, 265.1295], abs=1e-4)
    assert profile_interval(fitted, 1) == pytest.approx([7.358653, 13.575919], abs=1e-5)


def test_sleepstudy_with_independent_slopes_and_by_maximum_likelihood() -> None:
    """(1 | Subject) + (0 + Days | Subject), where the degrees of freedom are not whole numbers; and ML."""
    y, x, subject = sleepstudy()
    terms = [grouped("Subject", subject, x[:, 0]), grouped("Subject", subject, x[:, 1])]
    fitted = fit(y, x, terms)
    assert [f"{value:.3f}" for value in fitted.errors] == ["6.885", "1.560"]
    assert [f"{value:.2f}" for value in fitted.df] == ["18.16", "18.16"] and f"{fitted.criterion:.1f}" == "1743.7"
    assert f"{fit(y, x, [grouped('Subject', subject, *x.T)], reml=False).criterion:.4f}" == "1751.9393"


def test_penicillin_with_crossed_effects_as_lme4_prints_it() -> None:
    """diameter ~ 1 + (1 | plate) + (1 | sample), in either order of the terms."""
    one = np.ones(144)
    plate = grouped("plate", np.repeat(np.arange(24), 6), one)
    sample = grouped("sample", np.tile(np.arange(6), 24), one)
    for terms in ([plate, sample], [sample, plate]):
        fitted = fit(PENICILLIN.ravel(), one[:, None], terms)
        variance = {term.name: value[0, 0] for term, value in zip(fitted.terms, fitted.variances, strict=True)}
        assert f"{fitted.beta[0]:.4f} {fitted.errors[0]:.4f}" == "22.9722 0.8086"
        assert f"{variance['plate']:.4f} {fitted.sigma2:.4f} {fitted.criterion:.4f}" == "0.7169 0.3024 330.8606"
        assert f"{np.sqrt(variance['sample']):.4f}" == "1.9316"


def test_dyestuff_and_the_singular_dyestuff2() -> None:
    one, batch = np.ones((30, 1)), np.repeat(np.arange(6), 5)
    fitted = fit(DYESTUFF.ravel(), one, [grouped("Batch", batch, one[:, 0])])
    assert f"{fitted.beta[0]:.1f} {fitted.errors[0]:.2f} {fitted.criterion:.4f}" == "1527.5 19.38 319.6543"
    assert f"{fitted.variances[0][0, 0]:.0f} {fitted.sigma2:.0f} {fitted.df[0]:.3f}" == "1764 2451 5.000"
    fitted = fit(DYESTUFF2.ravel(), one, [grouped("Batch", batch, one[:, 0])])
    assert f"{fitted.beta[0]:.4f} {np.sqrt(fitted.sigma2):.4f} {fitted.criterion:.4f}" == "5.6656 3.7157 161.8283"
    assert fitted.variances[0][0, 0] == 0 and fitted.df[0] == pytest.approx(29, abs=1e-3)
    assert fitted.singular == ("the variance of column 0 by Batch is estimated as 0",)


def test_wine_as_ordinal_clmm_prints_it() -> None:
    """clmm(rating ~ temp + contact + (1 | judge)): Laplace; and clmm2's ten nodes (Christensen's tutorial)."""
    x = np.stack([np.tile([0, 0, 0, 0, 1, 1, 1, 1.0], 9), np.tile([0, 0, 1, 1, 0, 0, 1, 1.0], 9)], axis=1)
    judge = grouped("judge", np.repeat(np.arange(9), 8), np.ones(72))
    fitted = fit_ordinal(WINE.ravel(), x, judge, nodes=1)
    assert [f"{value:.3f}" for value in fitted.beta] == ["3.063", "1.835"]
    assert [f"{value:.4f}" for value in fitted.errors] == ["0.5954", "0.5126"]
    assert fitted.alpha == pytest.approx([-1.62367, 1.51337, 4.22853, 6.08877], abs=2e-4)
    assert f"{fitted.log_likelihood:.2f} {fitted.aic:.2f}" == "-81.57 177.13"
    assert fitted.variance[0, 0] == pytest.approx(1.2795, abs=2e-4)
    assert fitted.p_values == pytest.approx([2.68e-7, 3.44e-4], rel=5e-3)
    assert f"{fit_ordinal(WINE.ravel(), x, judge, nodes=10).log_likelihood:.2f}" == "-81.53"


# --- Independent references ---------------------------------------------------------------------------------------


def uneven(seed: int) -> tuple[np.ndarray, np.ndarray, list[Term]]:
    """Unbalanced ratings with crossed excerpts."""
    generator = np.random.default_rng(seed)
    kept = generator.random(10 * 16) < 0.7
    person, piece = np.repeat(np.arange(10), 16)[kept], np.tile(np.arange(16), 10)[kept]
    system = (piece >= 8).astype(float)
    own, each = generator.normal(size=(10, 2)), generator.normal(size=16)
    y = 4 + own[person, 0] + (1 + own[person, 1]) * system + each[piece] + 1.5 * generator.normal(size=len(person))
    x = np.stack([np.ones_like(system), system], axis=1)
    return y, x, [grouped("participant", person, *x.T), grouped("excerpt", piece, x[:, 0])]


def test_criterion_and_degrees_of_freedom_against_dense_matrices_in_other_parameters() -> None:
    """REML from the covariance matrix of the observations, as a function of variances and covariances."""
    y, x, terms = uneven(6)
    fitted = fit(y, x, terms)
    assert not fitted.singular  # the dense form below has no boundary
    member = (terms[0].groups[:, None] == terms[0].groups).astype(float)
    piece = (terms[1].groups[:, None] == terms[1].groups).astype(float)
    s = x[:, 1]
    # intercept variance, covariance, slope variance, excerpt variance, residual
    parts = [member, member * (s[:, None] + s), member * s[:, None] * s, piece, np.eye(len(y))]

    def solve(values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        inverse = np.linalg.inv(sum(value * part for value, part in zip(values, parts, strict=True)))
        covariance = np.linalg.inv(x.T @ inverse @ x)
        beta = covariance @ x.T @ inverse @ y
        left = y - x @ beta
        deviance = -np.linalg.slogdet(inverse)[1] - np.linalg.slogdet(covariance)[1] + left @ inverse @ left
        return float(deviance + (len(y) - 2) * math.log(2 * math.pi)), beta, covariance

    first = fitted.variances[0]
    point = np.array([first[0, 0], first[0, 1], first[1, 1], fitted.variances[1][0, 0], fitted.sigma2])
    deviance, beta, covariance = solve(point)
    assert fitted.criterion == pytest.approx(deviance, abs=1e-8)
    assert fitted.beta == pytest.approx(beta, rel=1e-8)
    assert fitted.covariance == pytest.approx(covariance, rel=1e-7)
    best = optimize.minimize(lambda v: solve(v)[0], point * 1.1, method="Nelder-Mead", options={"maxfev": 600})
    assert best.fun >= fitted.criterion - 1e-9
    step = 0.02
    moves = step * np.eye(5)
    hessian = np.array([
        [(solve(point + a + b)[0] - solve(point + a - b)[0] - solve(point - a + b)[0] + solve(point - a - b)[0])
         / (4 * step**2) for b in moves] for a in moves
    ])  # fmt: skip
    slopes = np.array([np.diag(solve(point + a)[2] - solve(point - a)[2]) / (2 * step) for a in moves])
    df = 2 * np.diag(covariance) ** 2 / np.einsum("ip,ij,jp->p", slopes, 2 * np.linalg.inv(hessian), slopes)
    assert fitted.df == pytest.approx(df, rel=5e-3)
    assert 3 < fitted.df[1] < 25


def test_an_unbalanced_random_slope_against_statsmodels() -> None:
    from statsmodels.regression.mixed_linear_model import MixedLM

    y, x, terms = uneven(6)
    fitted = fit(y, x, terms[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = MixedLM(y, x, terms[0].groups, exog_re=x).fit(reml=True, method="lbfgs", gtol=1e-10)
    assert fitted.log_likelihood >= other.llf - 1e-6
    assert fitted.log_likelihood == pytest.approx(other.llf, abs=1e-4)
    assert fitted.beta == pytest.approx(other.fe_params, rel=1e-4)
    assert fitted.errors == pytest.approx(other.bse_fe, rel=1e-3)
    assert fitted.variances[0] == pytest.approx(other.cov_re, rel=2e-2, abs=1e-3)


def balanced(listeners: int, prompts: int, seed: int) -> tuple[np.ndarray, np.ndarray, Term]:
    person = np.repeat(np.arange(listeners), 2 * prompts)
    system = np.tile(np.repeat([0.0, 1.0], prompts), listeners)
    generator = np.random.default_rng(seed)
    y = power.draw(power.Population(), person, system, np.zeros_like(person), generator)
    x = np.stack([np.ones_like(system), system], axis=1)
    return y, x, Term("participant", ("Intercept", "tuned"), person, x)


def test_balanced_ratings_give_the_paired_t_test() -> None:
    y, x, term = balanced(9, 12, seed=2)
    fitted = fit(y, x, [term])
    assert not fitted.singular
    means = y.reshape(9, 2, 12).mean(axis=2)
    test = stats.ttest_rel(means[:, 1], means[:, 0])
    assert fitted.beta[1] == pytest.approx((means[:, 1] - means[:, 0]).mean())
    assert fitted.beta[1] / fitted.errors[1] == pytest.approx(test.statistic, rel=1e-6)
    assert fitted.df[1] == pytest.approx(8, rel=1e-4)
    assert fitted.p_values[1] == pytest.approx(test.pvalue, rel=1e-4)
    ends = test.confidence_interval(0.95)
    assert fitted.interval("t")[1] == pytest.approx([ends.low, ends.high], rel=1e-4)
    wald = fitted.interval("normal")[1]
    assert wald[1] - wald[0] == pytest.approx(2 * 1.959964 * fitted.errors[1])


def test_quadrature_in_two_dimensions_against_a_fine_grid() -> None:
    generator = np.random.default_rng(5)
    category, x = generator.integers(0, 4, 12), generator.normal(size=(12, 1))
    term = grouped("participant", np.repeat([0, 1], 6), np.ones(12), x[:, 0])
    alpha, beta, factor = np.array([-1.0, 0.2, 1.5]), np.array([0.7]), np.array([[0.9, 0.0], [0.3, 0.6]])
    grid = np.linspace(-8, 8, 401)
    u = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    density = stats.norm.pdf(u).prod(axis=1) * (grid[1] - grid[0]) ** 2
    edges = np.concatenate([[-np.inf], alpha, [np.inf]])
    total = 0.0
    for group in (0, 1):
        product = np.ones(len(u))
        for row in np.flatnonzero(term.groups == group):
            eta = x[row] @ beta + u @ (term.z[row] @ factor)
            low, high = edges[category[row]], edges[category[row] + 1]
            product *= stats.logistic.cdf(high - eta) - stats.logistic.cdf(low - eta)
        total += math.log(product @ density)
    # rows in another order are the same data
    order = generator.permutation(12)
    mixed_up = Term(term.name, term.columns, term.groups[order], term.z[order])
    found = Likelihood(category[order], 4, x[order], mixed_up, nodes=15)(alpha, beta, factor)
    assert found == pytest.approx(-2 * total, abs=1e-5)


# --- Optimisers and edges -----------------------------------------------------------------------------------------


def test_an_optimiser_that_stops_elsewhere_is_reported_and_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x, subject = sleepstudy()
    honest = fit(y, x, [grouped("Subject", subject, *x.T)])
    original = optimize.minimize

    def lazy(value: object, start: np.ndarray, *args: object, **options: object) -> object:
        if options["method"] == "Powell":  # claims success at its starting point
            return optimize.OptimizeResult(x=start, fun=value(start), nfev=1, success=True)  # type: ignore[operator]
        return original(value, start, *args, **options)

    monkeypatch.setattr(mixed.optimize, "minimize", lazy)
    fitted = fit(y, x, [grouped("Subject", subject, *x.T)])
    assert fitted.criterion == pytest.approx(honest.criterion, abs=1e-7)
    assert {run.start for run in fitted.disagreeing if run.optimiser == "Powell"} >= {"unit", "small", "large"}
    assert all(run.criterion >= fitted.criterion - 1e-7 for run in fitted.runs)


def test_singular_fits_say_what_is_degenerate() -> None:
    y, x, term = balanced(6, 10, seed=6)
    flat = y.reshape(6, 2, 10)
    flat = flat - flat.mean(axis=2, keepdims=True)
    level = np.linspace(-1, 1, 6)
    parallel = flat + 5 + level[:, None, None]  # every participant has the same difference
    assert fit(parallel.ravel(), x, [term]).singular == ("the variance of tuned by participant is estimated as 0",)
    follows = flat + 5 + level[:, None, None] * np.array([1.0, 3.0])[:, None]
    assert fit(follows.ravel(), x, [term]).singular == (
        "the correlation of Intercept and tuned by participant is estimated as +1",
    )


def test_data_that_no_model_fits_are_refused() -> None:
    y, x, term = balanced(4, 3, seed=7)
    with pytest.raises(UserError, match="every rating is 3"):
        fit(np.full(24, 3.0), x, [term])
    with pytest.raises(UserError, match="collinear"):
        fit(y, np.concatenate([x, x[:, :1]], axis=1), [term])
    with pytest.raises(UserError, match="at least two different"):
        fit_ordinal(np.full(24, 3.0), x[:, 1:], grouped("participant", term.groups, x[:, 0]))
    with pytest.raises(UserError, match="no rating of one system is lower than any of another"):
        fit_ordinal(np.where(x[:, 1] > 0, 10.0, 1.0), x[:, 1:], grouped("participant", term.groups, x[:, 0]), nodes=3)


# --- What ratings cannot tell --------------------------------------------------------------------------------------


def told(cells: list[tuple[str, str, int]]) -> list[ratings.Rating]:
    """Ratings of (participant, system, rating), without prompts and excerpts."""
    return [ratings.Rating(line, person, system, float(value)) for line, (person, system, value) in enumerate(cells, 2)]


def drawn(systems: dict[str, range], per: int, seed: int, effect: int = 1) -> list[tuple[str, str, int]]:
    """``per`` ratings of each system by each of its participants."""
    generator = np.random.default_rng(seed)
    return [
        (f"p{person}", system, int(np.clip(round(5 + effect * number + generator.normal(0, 1.4)), 1, 10)))
        for number, (system, people) in enumerate(systems.items())
        for person in people
        for _ in range(per)
    ]


def found_in(cells: list[tuple[str, str, int]]) -> analyse.Analysis:
    systems = list(dict.fromkeys(system for _, system, _ in cells))
    done = analyse.analyse(told(cells), systems, replicates=0, seed=1)
    for table in done.tables:  # nothing leaves its scale
        for row in table.rows:
            values = dict(zip(table.columns, row, strict=True))
            for name in ("estimate", "difference", "mean", "t 2.5%", "t 97.5%", "Wald 2.5%", "profile 97.5%"):
                if table.title.startswith(("Fixed", "Paired", "Ratings")) and math.isfinite(values.get(name, math.nan)):
                    assert -9 <= values[name] <= 10, (table.title, row)
    return done


def title_of(done: analyse.Analysis, begin: str) -> str:
    return next((table.title for table in done.tables if table.title.startswith(begin)), "")


def test_a_system_that_one_participant_heard_is_not_compared() -> None:
    """Its effect and the variance of its effect cannot be told apart: once "+337.10 points (-1153 to +1827)"."""
    cells = [*drawn({"base": range(6), "tuned": range(6)}, 4, 1), ("p0", "rare", 9), ("p0", "rare", 8)]
    done = found_in(cells)
    outcome = {each.system: each for each in done.outcomes}
    assert outcome["rare"].mean.value == 8.5 and math.isnan(outcome["rare"].difference.value)
    assert "Left out: rare, heard by 1 participant, too few to compare it." in done.left
    assert math.isfinite(outcome["tuned"].difference.low)
    first, second, third = analyse.sentences(done.outcomes, [], "base", 6, 0)
    assert "rare cannot be compared with base (heard by 1 participant" in second and first.startswith(
        "6 people gave 50"
    )
    assert "cannot be told from these ratings" in third
    cases = [(0.5, 1.5, "0.50 to 1.50 higher"), (-1.5, -0.5, "0.50 to 1.50 lower")]
    for low, high, shown in [*cases, (-1.5, 0.25, "1.50 lower to 0.25 higher")]:
        found = Outcome("tuned", 9, 3, Estimate(5, 4, 6, 3), Estimate((low + high) / 2, low, high, 9))
        second = analyse.sentences([outcome["base"], found], [], "base", 3, 0)[1]
        assert shown in second and ("may be chance" in second) == (low < 0 < high)


@pytest.mark.parametrize("people", [(range(5), range(5, 10)), (range(3), range(3, 9))])
def test_participants_who_heard_one_system_each_have_no_variance_of_the_difference(people: tuple[range, range]) -> None:
    done = found_in(drawn(dict(zip(("base", "tuned"), people, strict=True)), 6, 2))
    assert title_of(done, "Fixed effects of rating ~ system + (1 | participant)")
    assert "(1 + system | participant), since" in done.left[0]
    components = next(table for table in done.tables if table.title.startswith("Random"))
    assert [row[0] for row in components.rows] == ["Intercept by participant", "Residual"]
    assert math.isfinite(done.outcomes[1].difference.low)


def test_as_many_random_effects_as_ratings_are_not_fitted() -> None:
    """lme4 refuses: the number of observations must be larger than that of the random effects."""
    done = found_in(drawn({"base": range(9), "tuned": range(9)}, 1, 3))
    assert "18 ratings cannot tell the 18 random effects by participant" in done.left[0]
    assert title_of(done, "Fixed effects of rating ~ system + (1 | participant)")
    with pytest.raises(UserError, match="20 ratings cannot tell the 20 random effects"):
        found_in(drawn({"base": range(10), "tuned": range(10, 20)}, 1, 4))


def test_variances_that_can_be_told_are_fitted_as_before() -> None:
    x, person = np.tile([[1.0, 0.0], [1.0, 1.0]], (12, 1)), np.repeat(np.arange(4), 6)
    full = grouped("participant", person, *x.T)
    assert analyse.unidentified(x, [full]) == ""
    assert analyse.unidentified(x, [full, grouped("copy", person, x[:, 0])])  # the same effect twice
    one = person[x[:, 1] == 1]
    assert analyse.unidentified(np.ones((12, 1)), [grouped("participant", one, np.ones(12))]) == ""
    _, x, subject = sleepstudy()
    assert analyse.unidentified(x, [grouped("Subject", subject, *x.T)]) == ""
    _, x, terms = uneven(6)
    assert analyse.unidentified(x, terms) == ""


def test_separated_ratings_have_no_odds_ratio() -> None:
    """clmm calls its Hessian singular; a standard error without its flat directions would be that of another number."""
    person = np.repeat(np.arange(5), 8)
    x = np.tile([0.0] * 4 + [1.0] * 4, 5)[:, None]
    level = grouped("participant", person, np.ones(40))
    generator = np.random.default_rng(1)
    tied = np.where(x[:, 0] > 0, generator.integers(5, 8, 40), generator.integers(2, 6, 40))  # 5 occurs in both
    apart = np.where(x[:, 0] > 0, generator.integers(6, 8, 40), generator.integers(2, 6, 40))
    for y in (tied, apart):
        assert set(y) != {1, 10}
        with pytest.raises(UserError, match=r"no rating of one system is lower than any of another \(but for ties\)"):
            fit_ordinal(y.astype(float), x, level)
    over = tied.copy()
    over[4] = 3  # one rating of the second system is lower: the estimate is finite
    fitted = fit_ordinal(over.astype(float), x, level)
    assert fitted.why == ("",) and 0 < fitted.beta[0] < 10 and np.isfinite(fitted.errors).all()
    # of three systems only one is separated from the others
    third = np.stack([np.tile([0, 1, 0, 1, 0, 1, 0, 0.0], 5), np.tile([0, 0, 0, 0, 0, 0, 1, 1.0], 5)], axis=1)
    y = np.where(third[:, 1] > 0, 9, generator.integers(3, 7, 40)).astype(float)
    fitted = fit_ordinal(y, third, level)
    assert fitted.why[0] == "" and "lower than any" in fitted.why[1]
    assert np.isfinite(fitted.errors[0]) and np.isnan(fitted.errors[1]) and np.isnan(fitted.interval()[1]).all()


def test_ratings_separated_within_participants_have_no_odds_ratio() -> None:
    """The likelihood is flat along the effect and the spread of the participants together."""
    cells = [
        (f"p{person}", system, 1 + person + (system == "tuned"))
        for person in range(8)
        for system in ("base", "tuned")
        for _ in range(4)
    ]
    cells[0], cells[-1] = ("p0", "base", 2), ("p7", "tuned", 8)
    done = found_in(cells)
    ordinal = next((table for table in done.tables if table.title.startswith("Cumulative")), None)
    if ordinal is not None:
        assert all(abs(row[2]) <= 10 and row[3] <= 10 for row in ordinal.rows)
    assert any("ordinal model" in line for line in done.left) or ordinal is not None


def test_three_systems_say_that_the_ordinal_slope_model_is_left_out() -> None:
    done = found_in(drawn({"base": range(5), "best": range(5), "tuned": range(5)}, 4, 5, 0))
    assert any(
        "the ordinal model with (1 + system | participant), which is fitted for two" in line for line in done.left
    )


def test_intervals_of_few_participants_stay_on_the_scale() -> None:
    generator = np.random.default_rng(9)
    for _ in range(4):
        cells = [
            (f"p{person}", system, int(generator.choice([1, 10])))
            for person in range(3)
            for system in ("base", "tuned")
            for _ in range(2)
        ]
        try:
            done = found_in(cells)
        except UserError:
            continue
        for outcome in done.outcomes:
            for found in (outcome.mean, outcome.difference):
                assert math.isnan(found.low) or -9 <= found.low <= found.value <= found.high <= 10
    assert "at least 10 can" in str(found_in(drawn({"base": range(4), "tuned": range(4)}, 4, 6)).tables[2].notes)


# --- Reading and exclusions ---------------------------------------------------------------------------------------

HEADER = "participant,session,position,excerpt,system,prompt,seed,rating,play_count,listened_s,response_ms,repeat,check"


def write_study(path: Path, *, listeners: int = 5, prompts: int = 4, name: str = "tuned") -> list[list[str]]:
    """A small exported study, with a silent check and two repeats each. Returns the rows without the header."""
    generator = np.random.default_rng(8)
    rows = []
    for person in range(listeners):
        level, likes = generator.normal(5, 1), generator.normal(1.5, 0.5)
        place, given = 0, {}
        for number, system in enumerate(["base", name]):
            for prompt in range(prompts):
                rating = int(np.clip(round(level + likes * number + generator.normal(0, 1.2)), 3, 8))
                given[system, prompt] = rating
                rows.append(
                    [f"p{person}", "s", place, f"{system[0]}{prompt}", system, prompt, 9, rating, 1, 10.0, 900, 0, ""]
                )
                place += 1
        for prompt in (0, 1):
            rating = given["base", prompt]
            rows.append([f"p{person}", "s", place, f"b{prompt}", "base", prompt, 9, rating, 1, 10.0, 900, 1, ""])
            place += 1
        rows.append([f"p{person}", "s", place, "quiet", "", "", "", 1, 1, 10.0, 900, 0, "silence"])
    texts = [[str(cell) for cell in row] for row in rows]
    save(path, texts)
    return texts


def save(path: Path, rows: list[list[str]], header: str = HEADER) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def test_every_rule_flags_what_was_planted_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    rows = write_study(path)
    per_person = 11
    rows[0 * per_person + 10][7] = "9"  # p0 likes silence
    for second in (8, 9):  # p1 rates the repeats at the other end of the scale
        rows[1 * per_person + second][7] = "10" if int(rows[1 * per_person + second - 8][7]) < 6 else "1"
    for number in range(8):
        rows[2 * per_person + number][7] = "5"  # p2 always presses 5
    for second in (8, 9):
        rows[2 * per_person + second][7] = "5"
    rows[3 * per_person + 2][9] = "1.5"  # p3 hears only a moment of one excerpt
    save(path, rows)
    read, missing = ratings.read_ratings(path)
    assert missing == ["user_agent", "utc", "version"]
    every, kept, found = ratings.exclude(read, ratings.Rules(3, 3, 8, frozenset({"b3"})))
    assert len(every) == 40
    assert [(each.participants, len(each.lines)) for each in found] == [
        (("p0",), 8), (("p1",), 8), (("p2",), 8), (("p3",), 1), (("p0", "p1", "p2", "p3", "p4"), 5),
    ]  # fmt: skip
    assert [each.participant for each in kept].count("p3") == 6 and [each.participant for each in kept].count("p4") == 7
    assert len(kept) == 13 and {each.line for each in kept} | set().union(*(e.lines for e in found)) == {
        each.line for each in every
    }
    table = analyse.exclusion_table(read, every, len(kept), found)
    counts = {row[0]: row[2:4] for row in table.rows}
    assert counts["rows of the file"] == (55, 5) and counts["set aside: second hearings"] == (10, 5)
    assert counts["all ratings"] == (40, 5) and counts["after exclusions"] == (13, 2)
    assert counts["excluded by at least one rule"] == (27, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[4].__setitem__(7, "11"), "line 6: rating must lie in 1 to 10, got 11"),
        (lambda rows: rows[4].__setitem__(7, "nan"), "line 6: rating must be a number, got nan"),
        (lambda rows: rows[0].__setitem__(4, ""), "line 2: system is empty"),
        (lambda rows: rows[1].__setitem__(9, "long"), "line 3: listened_s must be a number, got 'long'"),
        (lambda rows: rows[1].__setitem__(11, "maybe"), "line 3: repeat must be 0 or 1, got maybe"),
        (lambda rows: rows[2].pop(), "line 4: expected 13 cells"),
        (lambda rows: rows.insert(5, rows[4]), "line 7: duplicates line 6"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "ratings.csv"
    rows = write_study(path)
    change(rows)  # type: ignore[operator]
    save(path, rows)
    with pytest.raises(UserError) as caught:
        ratings.read_ratings(path)
    assert message in caught.value.message and "1 of " in caught.value.message


def test_columns_and_systems_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text("participant,score\na,3\n")
    with pytest.raises(UserError, match="no column system or rating"):
        ratings.read_ratings(path)
    path.write_text("participant,system,rating\na,base,3\n")
    with pytest.raises(UserError, match="base only"):
        analyse.pick_systems(ratings.read_ratings(path)[0], None)
    rows = [f"p{person},{system},{3 + (person * 7 + take * 5) % 4}" for person in range(4) for take in range(4)
            for system in ("b", "a")]  # fmt: skip
    path.write_text("\n".join(["participant,system,rating", *rows]))
    read, missing = ratings.read_ratings(path)
    assert missing == list(ratings.OPTIONAL)
    systems, why = analyse.pick_systems(read, "b")
    assert systems == ["b", "a"] and "as given by --reference" in why
    with pytest.raises(UserError, match="--reference c: no such system"):
        analyse.pick_systems(read, "c")
    found, left = analyse.crossed_terms(read)
    assert not found and len(left) == 2


@pytest.mark.slow
def test_the_whole_analysis_of_a_small_study(tmp_path: Path) -> None:
    path, out = tmp_path / "ratings.csv", tmp_path / "report"
    rows = write_study(path, name="=<b>tuned")
    rows[10][7] = "9"
    save(path, rows)
    done = CliRunner().invoke(main, ["analyse", str(path), "--out", str(out), "--bootstrap", "10"])
    assert done.exit_code == 0, done.output
    assert "excluded: silence rated above 3 (excludes the participant): 8 ratings" in done.output
    html = (out / "report.html").read_text()
    # three sentences and one table first; models, fits and exclusions after them, folded
    first, _, folded = html.partition("<details>")
    assert first.count("<table>") == 1 and first.count("<p>") == 1 and "REML" not in first
    assert all(f"<summary>{name}</summary>" in html for name in ("All ratings", "After exclusions", "Exclusions"))
    assert "Fixed effects of rating ~ system" in folded and "flagged: silence rated above 3" in folded
    assert done.output.startswith(
        "5 people gave 40 ratings from 1 to 10 to music by base and =<b>tuned; 8 of these are"
    )
    assert len(done.output.splitlines()) < 20
    assert "<b>tuned" not in html and "&lt;b&gt;tuned" in html and "http" not in html
    assert (out / "figure5.pdf").stat().st_size > 1000 and (out / "figure5.png").stat().st_size > 1000
    with (out / "figure5.csv").open() as file:
        drawn = list(csv.DictReader(file))
    assert sum(int(row["count"]) for row in drawn) == 40
    assert {row["system"] for row in drawn} == {"base", "'=<b>tuned"}  # the apostrophe defuses the formula
    with (out / "tables.csv").open() as file:
        values = {(r["ratings"], r["table"][:5], r["label"], r["column"]): r["value"] for r in csv.DictReader(file)}
    read = ratings.read_ratings(path)[0]
    for name, kept in (("All ratings", {"p0", "p1", "p2", "p3", "p4"}), ("After exclusions", {"p1", "p2", "p3", "p4"})):
        rated = [each for each in read if not each.check and not each.repeat and each.participant in kept]
        gaps = [
            np.mean([e.rating for e in rated if e.participant == person and e.system != "base"])
            - np.mean([e.rating for e in rated if e.participant == person and e.system == "base"])
            for person in kept
        ]
        assert float(values[name, "Fixed", "'=<b>tuned", "estimate"]) == pytest.approx(np.mean(gaps))
        shown = f"{np.mean(gaps):.2f} points higher than base" if name == "All ratings" else f"{np.mean(gaps):+.2f} ["
        assert shown in done.output
        assert int(values[name, "Ratin", "base", "n"]) == 4 * len(kept)
    assert "Categories without a rating, merged with their neighbours: 1, 2" in html
    again = CliRunner().invoke(main, ["analyse", str(path), "--out", str(out)])
    assert again.exit_code == 2 and "--overwrite" in again.output


# --- Simulation ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_simulated_studies_have_the_power_and_coverage_that_theory_gives() -> None:
    """Balanced studies: the noncentral t of the paired test. Bounds: binomial, one in ten thousand outside."""
    listeners, prompts, studies = 8, 6, 150
    found = power.simulate_power(listeners, prompts, power.Population(), studies=studies, seed=3, show=False)
    spread = math.sqrt((0.752 + 2 * 4.194 / prompts) / listeners)
    reach = stats.t.ppf(0.975, listeners - 1)
    theory = 1 - stats.nct.cdf(reach, listeners - 1, 1.221 / spread)
    low, high = stats.binom.ppf([0.00005, 0.99995], studies, theory) / studies
    assert 0.2 < theory < 0.9 and low <= found.power <= high
    low, high = stats.binom.ppf([0.00005, 0.99995], studies, 0.95) / studies
    assert low <= found.coverage <= high
    assert found.power_low < found.power < found.power_high
    first = [power.simulate_power(5, 3, power.Population(), studies=10, seed=seed, show=False) for seed in (3, 3, 4)]
    assert first[0] == first[1] != first[2]


def test_excerpts_that_differ_widen_the_interval_and_rounding_takes_from_the_effect() -> None:
    plain = power.simulate_power(6, 4, power.Population(), studies=15, seed=1, show=False)
    pieces = power.simulate_power(6, 4, power.Population(excerpt_variance=2.0), studies=15, seed=1, show=False)
    assert pieces.width > 1.1 * plain.width
    rounded = power.Population(rounded=True, intercept=8.5, effect=2.0)
    person, system = np.repeat(np.arange(20000), 2), np.tile([0.0, 1.0], 20000)
    y = power.draw(rounded, person, system, np.zeros_like(person), np.random.default_rng(0))
    difference = y[system == 1].mean() - y[system == 0].mean()
    assert set(np.unique(y)) <= set(range(1, 11))
    assert difference == pytest.approx(power._rounded_effect(rounded), abs=0.05) and difference < 1.5


@pytest.mark.slow
def test_power_on_the_command_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["power", "--listeners", "6", "--prompts", "3", "--studies", "20", "--out", str(tmp_path / "power")]
    )
    assert done.exit_code == 0, done.output
    with (tmp_path / "power" / "power.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["listeners"]) for row in rows] == power.grid(6) == [3, 4, 6, 9, 12]
    assert all(float(row["power_low"]) <= float(row["power"]) <= float(row["power_high"]) for row in rows)
    assert (tmp_path / "power" / "power.png").is_file() and "With 6 listeners and 3 prompts" in done.output
    wrong = CliRunner().invoke(main, ["power", "--excerpt-variance", "5", "--studies", "20"])
    assert wrong.exit_code == 2 and "--residual-variance" in wrong.output
    assert power.exact(0, 20)[0] == 0 and power.exact(20, 20)[1] == 1


def test_the_problem_with_another_response_is_the_problem_built_anew() -> None:
    y, x, terms = uneven(3)
    theta = np.array([0.7, 0.2, 0.5, 0.9])
    moved = Problem(y, x, terms).with_response(y[::-1].copy())
    assert moved.criterion(theta) == pytest.approx(Problem(y[::-1].copy(), x, terms).criterion(theta), rel=1e-12)


def test_the_columns_are_those_of_the_export_and_a_study_tells_what_is_silent(tmp_path: Path) -> None:
    from smart.study.export import COLUMNS
    from smart.study.folder import KEY_COLUMNS

    assert set(ratings.NEEDED + ratings.OPTIONAL) == set(COLUMNS)
    with (tmp_path / "key.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, KEY_COLUMNS, restval="0")
        table.writeheader()
        table.writerows([{"excerpt": "a", "silent": 1}, {"excerpt": "b", "silent": 0}])
    with pytest.raises(UserError, match="cannot be read"):
        ratings.read_study(tmp_path)
    for wrong in ("NaN", "9" * 400, "0", "-1"):
        (tmp_path / "study.json").write_text(f'{{"seconds": {wrong}}}')
        with pytest.raises(UserError, match="cannot be read"):
            ratings.read_study(tmp_path)
    (tmp_path / "study.json").write_text('{"seconds": 4.5}')
    assert ratings.read_study(tmp_path) == (frozenset({"a"}), 4.5)
