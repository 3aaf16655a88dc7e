"""The memory that training needs, computed and measured."""
