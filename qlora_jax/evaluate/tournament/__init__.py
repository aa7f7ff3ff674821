"""What verdicts say: verdicts (readers) → games → elo, bradley_terry; relative, categories, agreement; figures."""
