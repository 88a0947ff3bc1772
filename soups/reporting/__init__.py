"""Tables and figures from records on disk alone, so that any report can be made again."""

from soups.reporting.differences import differences as differences
from soups.reporting.differences import flatten as flatten
from soups.reporting.figures import draw_all as draw_all
from soups.reporting.html import render as render
from soups.reporting.html import write_html as write_html
from soups.reporting.page import Page as Page
from soups.reporting.pairs import compare_members as compare_members
from soups.reporting.protocol import draw_page as draw_page
from soups.reporting.protocol import page_tables as page_tables
from soups.reporting.report import Report as Report
from soups.reporting.report import Row as Row
from soups.reporting.soup_page import page_of as page_of
from soups.reporting.soup_page import read_page as read_page
from soups.reporting.soup_page import remake as remake
from soups.reporting.soup_page import save_page as save_page
from soups.reporting.soup_report import Decision as Decision
from soups.reporting.soup_report import SoupReport as SoupReport
from soups.reporting.table import plain_rows as plain_rows
from soups.reporting.table import summary_sentence as summary_sentence
from soups.reporting.table import tables as tables
from soups.reporting.table import write_csv as write_csv
