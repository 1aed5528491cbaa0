// The mathematics of one row of logits, shared by every compiled backend.
//
//   state (m, s, t): m = max z, s = sum exp(z - m), t = sum (z - m) exp(z - m)
//   lse = m + log s;  entropy = log s - t / s;  logp = (z_target - m) - log s
//   dz_j = c ([j = target] - p_j) + e p_j (log p_j + entropy),  c = dL/dlogp,  e = -dL/dentropy
//
// Two states of disjoint parts of a row merge into the state of their union, so a row may be read in any tiles.
#pragma once

#include <cmath>

#include "portable.h"

namespace bandit_rft {

constexpr float kLowest = -3.402823466e+38f;  // stands for -inf as a maximum: -inf - (-inf) would be NaN

template <class Real>
struct SoftmaxState {
    float m = kLowest;
    Real s = 0, t = 0;
};

template <class Real>
BRFT_INLINE SoftmaxState<Real> merge(const SoftmaxState<Real>& a, const SoftmaxState<Real>& b) {
    const float m = a.m > b.m ? a.m : b.m;
    const Real da = Real(a.m) - Real(m), db = Real(b.m) - Real(m);
    const Real wa = a.s == 0 ? Real(0) : Real(exp(da)), wb = b.s == 0 ? Real(0) : Real(exp(db));
    SoftmaxState<Real> out;
    out.m = m;
    out.s = a.s * wa + b.s * wb;
    out.t = (a.s == 0 ? Real(0) : (a.t + da * a.s) * wa) + (b.s == 0 ? Real(0) : (b.t + db * b.s) * wb);
    return out;
}

// Log-probability of a logit z under the softmax whose state is given; relative to m, so exact at any magnitude of z.
template <class Real>
BRFT_INLINE float row_logprob(const SoftmaxState<Real>& a, float z) {
    return float(Real(z) - Real(a.m) - Real(log(a.s)));
}

template <class Real>
BRFT_INLINE float row_entropy(const SoftmaxState<Real>& a) {
    return float(Real(log(a.s)) - a.t / a.s);
}

// z = softcap * tanh(logit_scale * x / softcap) / temperature; softcap 0 means none.
struct Scaling {
    float logit_scale = 1.0f, softcap = 0.0f;
};

// The numbers are those of kernels/enumerations.py (Python and Triton); the module exports them, and a test compares.
// given: dL/dlogp is the caller's.
enum class ObjectiveKind : int { given = 0, reinforce = 1, importance = 2, ppo = 3, cispo = 4, importance_mask = 5 };
enum class KlKind : int { none = 0, k1 = 1, k2 = 2, k3 = 3 };

struct Objective {
    ObjectiveKind kind = ObjectiveKind::given;
    float ratio_low = 0, ratio_high = 0;  // bounds of the ratio; importance reads ratio_high alone
    float dual_clip = 0;                  // 0 means none
    KlKind kl = KlKind::none;
    float kl_coef = 0, entropy_coef = 0;
};

// c = dL/dlogp of one token. `ratio` is exp(logp - behavior), or 1 on policy; `reference` is read if there is a KL
// term.
BRFT_INLINE float token_coefficient(const Objective& o, float logp, float ratio, float advantage, float weight,
                                    float reference) {
    float c = 0.0f;
    if (advantage != 0.0f) {
        float factor = 1.0f;
        switch (o.kind) {
            case ObjectiveKind::importance:
                factor = fminf(ratio, o.ratio_high);
                break;
            case ObjectiveKind::cispo:
                factor = fminf(fmaxf(ratio, o.ratio_low), o.ratio_high);
                break;
            case ObjectiveKind::importance_mask:
                factor = ratio < o.ratio_low || ratio > o.ratio_high ? 0.0f : ratio;
                break;
            case ObjectiveKind::ppo: {
                const bool clipped = (advantage < 0 && ratio < o.ratio_low) ||
                                     (advantage > 0 && ratio > o.ratio_high) ||
                                     (advantage < 0 && o.dual_clip > 0 && ratio > o.dual_clip);
                factor = clipped ? 0.0f : ratio;
                break;
            }
            default:
                break;
        }
        if (ratio != ratio) factor = ratio;  // fminf and fmaxf would hide a NaN
        c = factor == 0.0f ? 0.0f : -advantage * weight * factor;
    }
    if (o.kl != KlKind::none) {
        const float d = logp - reference;
        const float slope = o.kl == KlKind::k1 ? 1.0f : (o.kl == KlKind::k2 ? d : -expm1f(-d));
        c += o.kl_coef * weight * slope;
    }
    return c;
}

}  // namespace bandit_rft
