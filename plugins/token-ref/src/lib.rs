//! Gearbox transform that predicts rows exactly from the latest earlier row of the same token.
