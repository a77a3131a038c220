# SPDX-License-Identifier: GPL-2.0-only
# What the guest.sh scripts print: programs' TAP, each between a line "#### KSM: program" and
# a line "#### exit STATUS ...".

package KselftestRuns;

use strict;
use warnings;
use Exporter 'import';
our @EXPORT_OK = qw(each_run);

# Calls $take->(KSM, program, TAP, rest of the exit line) for each in $file.
sub each_run {
    my ($file, $take) = @_;
    my ($ksm, $program, $tap);
    while (my $line = <$file>) {
        $line =~ s/\r$//;
        if ($line =~ /^#### exit (\d.*)/) {
            $take->($ksm, $program, $tap, $1) if defined $tap;
            undef $tap;
        } elsif ($line =~ /^#### (.+?): (.+)$/) {
            ($ksm, $program, $tap) = ($1, $2, '');
        } elsif (defined $tap) {
            # "Bail out!" is how kselftest ends after a failure that it has reported: it ends this
            # program, not the test.
            $tap .= $line =~ s/^(?=Bail out!)/# /r;
        }
    }
}

1;
