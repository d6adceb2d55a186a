"""The command that trains the sentiment classifier: see :mod:`reward_models.sentiment.training`.

python -m reward_models.train_classifier --config recipes/configs/sentiment_classifier.yaml
accelerate launch reward_models/train_classifier.py --output_dir runs/sentiment
"""

from reward_models.sentiment.training import main

if __name__ == "__main__":
    main()
