"""What is known of Hugging Face transformers. Importing a file other than ``capture`` needs it."""
