#!/usr/bin/perl
# SPDX-License-Identifier: GPL-2.0-only
# Usage: compare.pl < output of guest.sh
#
# Compares what upstream's tests say of the built-in KSM and of rksm in the same boot, and
# prints it in TAP and as a table. What passes there and not here fails. What passes
# nowhere is skipped, as it needs something that the kernel does not have. Of a case that
# was tried again the last try counts, and the table says how many there were.

use strict;
use warnings;
use FindBin;
use lib $FindBin::Bin;
use KselftestRuns qw(each_run);
use TAP::Parser;

my (%result, %tries, @cases);

# One program's TAP. A program with one test is its options' case.
sub take {
    my ($ksm, $program, $tap) = @_;
    $tries{"$ksm: $program"}++;
    my $parser = TAP::Parser->new({ tap => $tap });
    my $tests = 0;
    while (my $line = $parser->next) {
        next unless $line->is_test;
        $tests++;
        my $name = $line->description;
        $name =~ s/^-?\s+//;
        $name =~ s/^\w+\.//;
        # Some tests have the same name, and a few name what failed
        my $case = "$program: " . ($program =~ /^ksm_tests/ ? 'result' : "$tests");
        push @cases, $case unless $result{$case};
        $result{$case}{$ksm} = $line->has_skip ? 'skip' : $line->is_ok ? 'pass' : 'FAIL';
        $result{$case}{"$ksm tries"} = $tries{"$ksm: $program"};
        $result{$case}{name} //= $program =~ /^ksm_tests/ ? $program : "$program: $name";
    }
    # A crash or an exit half-way
    my $case = "$program: completes";
    push @cases, $case unless $result{$case};
    $result{$case}{$ksm} = $parser->is_good_plan ? 'pass' : 'FAIL';
    $result{$case}{name} = "$program completes";
}

each_run(\*STDIN, \&take);

print "TAP version 13\n1.." . (@cases || 1) . "\n";
print "not ok 1 no test ran\n" unless @cases;
my ($table, $tests, $n) = ('', '', 0);
for my $case (@cases) {
    my $r = $result{$case};
    my ($there, $here) = map { $r->{$_} // 'missing' } 'built-in', 'rksm';
    $n++;
    my ($tried_there, $tried_here) = map {
        my $tries = $r->{"$_ tries"} // 1;
        ($r->{$_} // 'missing') . ($tries > 1 ? " ($tries)" : '')
    } 'built-in', 'rksm';
    $table .= sprintf "#| %-66s %-9s %s\n", $r->{name}, $tried_there, $tried_here
        unless $case =~ /completes$/ && $there eq $here;
    if ($here eq 'pass') {
        $tests .= "ok $n $r->{name}\n";
    } elsif ($there ne 'pass') {
        $tests .= "ok $n $r->{name} # SKIP on the built-in too: $there\n";
    } else {
        $tests .= "not ok $n $r->{name}: $there on the built-in, $here on rksm\n";
    }
}
printf "#| %-66s %-9s %s\n", "upstream's test", 'built-in', 'rksm' if @cases;
print $table, $tests;
