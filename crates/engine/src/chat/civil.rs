//! A date from a count of seconds, written as `strftime` of C does, for templates that tell the model the day.
//!
//! Invariant: UTC and English names, whatever the machine is set to. Left out: directives of other locales.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];
const SECONDS_A_DAY: i64 = 86_400;
const DAYS_IN_400_YEARS: i64 = 146_097;

/// A moment in the Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Civil {
    year: i64,
    /// From 0.
    month: usize,
    /// From 1.
    day: i64,
    /// Of the year, from 1.
    day_of_year: i64,
    /// From Monday, 0.
    weekday: usize,
    second_of_day: i64,
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in(year: i64) -> i64 {
    if is_leap(year) { 366 } else { 365 }
}

impl Civil {
    /// The moment `seconds` after the beginning of 1970.
    pub(super) fn at(seconds: i64) -> Civil {
        let days = seconds.div_euclid(SECONDS_A_DAY);
        // 1 January 1970 was a Thursday.
        let weekday = (days + 3).rem_euclid(7) as usize;
        // The calendar repeats after 400 years; within them a year at a time is soon done.
        let mut year = 1970 + 400 * days.div_euclid(DAYS_IN_400_YEARS);
        let mut rest = days.rem_euclid(DAYS_IN_400_YEARS);
        while rest >= days_in(year) {
            rest -= days_in(year);
            year += 1;
        }
        let day_of_year = rest + 1;
        let february = if is_leap(year) { 29 } else { 28 };
        let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        let mut month = 0;
        while rest >= lengths[month] {
            rest -= lengths[month];
            month += 1;
        }
        Civil {
            year,
            month,
            day: rest + 1,
            day_of_year,
            weekday,
            second_of_day: seconds.rem_euclid(SECONDS_A_DAY),
        }
    }

    /// `format` with its directives replaced; those that are not known stay as they are.
    pub(super) fn format(&self, format: &str) -> String {
        let mut text = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                text.push(c);
                continue;
            }
            match chars.next() {
                // GNU's way to ask for a number without the zero before it.
                Some('-') => match chars.next() {
                    Some(directive) => match self.directive(directive) {
                        Some(value) => {
                            let bare = value.trim_start_matches(['0', ' ']);
                            text.push_str(if bare.is_empty() { "0" } else { bare });
                        }
                        None => text.extend(['%', '-', directive]),
                    },
                    None => text.push_str("%-"),
                },
                Some(directive) => match self.directive(directive) {
                    Some(value) => text.push_str(&value),
                    None => text.extend(['%', directive]),
                },
                None => text.push('%'),
            }
        }
        text
    }

    fn directive(&self, directive: char) -> Option<String> {
        let (hour, minute, second) = (
            self.second_of_day / 3600,
            self.second_of_day / 60 % 60,
            self.second_of_day % 60,
        );
        let (month, weekday) = (MONTHS[self.month], DAYS[self.weekday]);
        Some(match directive {
            'Y' => self.year.to_string(),
            'y' => format!("{:02}", self.year.rem_euclid(100)),
            'm' => format!("{:02}", self.month + 1),
            'B' => month.to_owned(),
            'b' | 'h' => month[..3].to_owned(),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'j' => format!("{:03}", self.day_of_year),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'u' => (self.weekday + 1).to_string(),
            'w' => ((self.weekday + 1) % 7).to_string(),
            'H' => format!("{hour:02}"),
            'I' => format!("{:02}", (hour + 11) % 12 + 1),
            'p' => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            'f' => "000000".to_owned(),
            'F' => self.format("%Y-%m-%d"),
            'T' | 'X' => self.format("%H:%M:%S"),
            'R' => self.format("%H:%M"),
            'D' | 'x' => self.format("%m/%d/%y"),
            'c' => self.format("%a %b %e %H:%M:%S %Y"),
            'z' => "+0000".to_owned(),
            'Z' => "UTC".to_owned(),
            'n' => "\n".to_owned(),
            't' => "\t".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_python_writes_them() {
        let all = "%Y-%m-%d %H:%M:%S %A %a %B %b %j %y %I %p %-d %e %u %w %% %Q";
        assert_eq!(
            Civil::at(1_736_944_496).format(all),
            "2025-01-15 12:34:56 Wednesday Wed January Jan 015 25 12 PM 15 15 3 3 % %Q"
        );
        assert_eq!(
            Civil::at(951_782_400).format(all),
            "2000-02-29 00:00:00 Tuesday Tue February Feb 060 00 12 AM 29 29 2 2 % %Q"
        );
        assert_eq!(Civil::at(-1).format("%c"), "Wed Dec 31 23:59:59 1969");
        assert_eq!(
            Civil::at(1_735_689_599).format("%j %-d %-H %F"),
            "366 31 23 2024-12-31"
        );
        assert_eq!(Civil::at(0).format("%-M|%-|%"), "0|%-|%");
    }
}
