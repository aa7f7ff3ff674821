"""ROUGE-L of answers, as Super-NaturalInstructions measures it: stems, score, questions, tasks."""
