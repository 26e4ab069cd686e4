//! Gearbox codecs `planes` and `rans`: sign, exponent and mantissa planes, and interleaved range asymmetric numeral systems.
