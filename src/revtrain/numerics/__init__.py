"""Numerical fidelity, measured from outside: the layers know nothing of it.

snr         SNR in dB of every reconstructed activation (Eq. 15)
gradients   cosine and relative error of every parameter's gradient, `invert` against `store`
verify      all that `invert` leaves behind against `store`, of any model that contains chains
decibels    them in words
fidelity    whether gradients can still be trusted
theory      the paper's closed forms of the noise (section 4.1)
"""
