#!/usr/bin/perl
# SPDX-License-Identifier: GPL-2.0-only
# Usage: judge.pl [--record] DIRECTORY < output of guest.sh
#
# Judges what the kernel's mm tests say of rksm by what they say without KSM, and prints it in
# TAP and as a table. What passed without KSM is what did in this run, or else what
# DIRECTORY/without.txt says. A case is known by its program and its number.
#
# A case that passes without KSM passes with rksm. A case that is skipped there, which is how
# these tests say that they could not set up what they wanted to test, passes if another try
# does. One that fails in any try, and a program that ends early, stands in the list
# DIRECTORY/expected.txt, or is a failure. The list must name cases that there are.
#
# --record writes DIRECTORY/without.txt and, in Markdown, the table on standard output instead.

use strict;
use warnings;
use FindBin;
use lib "$FindBin::Bin/../upstream";
use KselftestRuns qw(each_run);
use TAP::Parser;

my $record = @ARGV && $ARGV[0] eq '--record' && shift;
my $directory = shift // die "usage: judge.pl [--record] DIRECTORY\n";

# PROGRAM: CASE, a tab, the line that counts on what KSM changes, and why. "~" before it: that
# fails in some tries only.
my (%reason, %sometimes);
my $list = "$directory/expected.txt";
open my $expected, '<', $list or die "$list: $!\n";
while (<$expected>) {
    next if /^\s*(?:#|$)/;
    chomp;
    my ($case, $why) = split /\t+/, $_, 2;
    die "$list:$.: not 'program: case', a tab, file:line and the reason\n"
        unless defined $why && $case =~ /^~?\S+: / && $why =~ /^[\w-]+\.[ch]:\d+ \S/;
    my $varies = $case =~ s/^~//;
    $reason{$case} = $why;
    $sometimes{$case} = 1 if $varies;
}

# {PROGRAM}{KIND}{NUMBER}: how often it has passed, failed, been skipped
my (%passed, %failed, %skipped, %names, %title, %tries, %seconds, %ends, @programs, %kinds, %copies);

each_run(\*STDIN, sub {
    my ($kind, $program, $tap, $exit) = @_;
    my ($status, $seconds, $copies) = split ' ', $exit;
    push @programs, $program unless $tries{$program};
    $kinds{$kind} = 1;
    $tries{$program}{$kind}++;
    $seconds{$program}{$kind} += $seconds // 0;
    $copies{$kind} += $copies // 0;

    my $parser = TAP::Parser->new({ tap => $tap });
    while (my $line = $parser->next) {
        next unless $line->is_test;
        my $n = $line->number;
        # kselftest says either "ok 1 # SKIP name" or "ok 1 name # SKIP why".
        my $name = $line->description =~ s/^-?\s+//r;
        $name = $line->explanation if $name !~ /\S/;
        $name =~ s/\s+$//;
        $names{$program}{$n}{$name}++;
        # With a KSM a case that is skipped may be called by the reason.
        $title{$program}{$n} = $name if $kind eq 'without' || $line->is_actual_ok && !$line->has_skip;
        my $to = $line->has_skip || $line->as_string =~ /# XFAIL/ ? \%skipped
            : $line->is_actual_ok ? \%passed : \%failed;
        $to->{$program}{$kind}{$n}++;
    }
    # At their end, too, programs of which a case failed bail out.
    my ($bail) = $tap =~ /^# Bail out! (?!\d+ out of \d+ tests failed)(.*?)\s*(?:# Totals.*)?$/m;
    my $end = defined $bail ? "Bail out! $bail"
        : $status !~ /^[014]$/ ? "exit status $status"
        : '';
    $ends{$program}{$kind}{$end}++;
});

my @kinds = grep { $kinds{$_} } qw(without built-in rksm rksm-zero);
my @judged = grep { /^rksm/ } @kinds;

# What is recorded of a run without KSM: PROGRAM: NUMBERS
if (!$kinds{without}) {
    open my $recorded, '<', "$directory/without.txt" or die "$directory/without.txt: $!\n";
    while (<$recorded>) {
        next if /^#/;
        my ($program, $numbers) = /^(.+): (.*)$/ or die "without.txt:$.: not 'program: numbers'\n";
        next unless $tries{$program};
        for (split ' ', $numbers) {
            my ($from, $to) = /^(\d+)(?:-(\d+))?$/ or die "without.txt:$.: not a number: $_\n";
            $passed{$program}{without}{$_} = 1 for $from .. $to // $from;
        }
    }
    unshift @kinds, 'without';
}

my (@tests, @notes, %listed, %not_passed, %missing);

sub test {
    my ($ok, $text) = @_;
    push @tests, ($ok ? 'ok ' : 'not ok ') . (@tests + 1) . " $text\n";
}

# The entry of the list that names one of these.
sub entry {
    my ($program, @names) = @_;
    my ($name) = split ' ', $program;
    my ($found) = grep { $reason{$_} } map { "$name: $_" } @names;
    $listed{$found} = 1 if defined $found;
    return $found;
}

# Whether each try ended early, and the list says that none can come to its end.
sub ends_as_listed {
    my ($program, $kind) = @_;
    my %ends = %{ $ends{$program}{$kind} };
    return !grep { my $entry = $_ && entry($program, $_); !$entry || $sometimes{$entry} } keys %ends;
}

for my $program (@programs) {
    my $without = $passed{$program}{without} // {};
    for my $n (sort { $a <=> $b } keys %$without) {
        my @names = sort keys %{ $names{$program}{$n} // { "case $n" => 1 } };
        my $title = "$program $n " . ($title{$program}{$n} // $names[0]);
        my $entry = entry($program, @names);
        my @wrong;
        for my $kind (grep { $_ ne 'without' && $tries{$program}{$_} } @kinds) {
            my ($p, $f, $s) = map { $_->{$program}{$kind}{$n} // 0 } \%passed, \%failed, \%skipped;
            next if $p && !$f;
            $not_passed{$kind}++ unless $p;
            my $what = join ', ', ($f ? "fails $f" : ()), ($s ? "skipped $s" : ()), ($p ? "passes $p" : ());
            # Where a program ends early the cases behind that are missing: one note, below, will do.
            if (!$what) {
                $missing{$program}{$kind}++;
                next if ends_as_listed($program, $kind);
            } else {
                push @notes, sprintf "%-9s %s: %s of %d", $kind, $title, $what, $tries{$program}{$kind};
            }
            push @wrong, "$kind: " . ($what || 'missing') if $kind =~ /^rksm/ and !defined $entry || !$p && $sometimes{$entry};
        }
        if (@wrong) {
            test(0, "$title: passes without KSM, @wrong");
        } elsif (defined $entry) {
            test(1, "$title # SKIP expected: $reason{$entry}");
        } else {
            test(1, $title);
        }
    }
    for my $kind (grep { $ends{$program}{$_} } @kinds) {
        for my $end (grep { $_ } sort keys %{ $ends{$program}{$kind} }) {
            my $times = $ends{$program}{$kind}{$end};
            my $missing = $missing{$program}{$kind} // 0;
            push @notes, sprintf "%-9s %s: %s: %d of %d%s", $kind, $program, $end, $times, $tries{$program}{$kind},
                $missing ? ", $missing cases missing" : '';
            next if $kind !~ /^rksm/ or $ends{$program}{without}{$end};
            my $entry = entry($program, $end);
            test(defined $entry, "$program: $end with $kind" . (defined $entry ? " # SKIP expected: $reason{$entry}" : ''));
        }
        test(1, "$program comes to its end with $kind") if $kind =~ /^rksm/ && !grep { $_ } keys %{ $ends{$program}{$kind} };
    }
}

# Only what these programs could have said can be asked of the list; what fails in some tries
# only may not have been seen.
my %here = map { (split ' ')[0] => 1 } @programs;
for (sort keys %reason) {
    next if $sometimes{$_} || !$here{ (/^(\S+): /)[0] };
    test($listed{$_}, "$_ is a case, as the list says");
}
test($copies{$_} > 0, "$_ merged pages under the tests ($copies{$_} were written to)") for @judged;
test(0, 'the tests ran with rksm') unless @judged;

# In one part or the other a scanner that is faster may be worse: the whole counts.
my %out = map { $_ => $not_passed{$_} // 0 } @kinds;
my $compared = join ', ', map { "$out{$_} do not with $_" } grep { $_ ne 'without' } @kinds;

my @table = map {
    my $program = $_;
    [ $program, map {
        my $cases = keys %{ $passed{$program}{$_} // {} };
        my $tries = $tries{$program}{$_} // ($_ eq 'without' ? 1 : 0);
        !$tries ? '-' : $cases . ($tries > 1 ? " ($tries)" : '')
    } @kinds ]
} @programs;

if (!$record) {
    print "TAP version 13\n1.." . @tests . "\n";
    printf "#| %-40s %s\n", $_->[0], join ' ', map { sprintf '%-10s', $_ } @$_[1 .. $#$_]
        for [ 'cases passed (tries)', @kinds ], @table;
    print "#| of what passes without KSM $compared\n";
    print "#| of these, with a KSM otherwise than without:\n", map { "#|   $_\n" } @notes if @notes;
    print @tests;
    exit;
}

die "to record it takes a run without KSM, and one with the built-in\n" unless $kinds{without} && $kinds{'built-in'};
open my $without, '>', "$directory/without.txt" or die "$directory/without.txt: $!\n";
print $without "# SPDX-License-Identifier: GPL-2.0-only\n",
    "# Which cases of the kernel's mm tests pass without KSM, by their numbers: judge.pl --record\n";
for my $program (sort @programs) {
    my @ranges;
    for (sort { $a <=> $b } keys %{ $passed{$program}{without} // {} }) {
        if (@ranges && $ranges[-1][1] == $_ - 1) {
            $ranges[-1][1] = $_;
        } else {
            push @ranges, [ $_, $_ ];
        }
    }
    print $without "$program: ", join(' ', map { $_->[0] == $_->[1] ? $_->[0] : join '-', @$_ } @ranges), "\n";
}
print '| ', join(' | ', 'program', @kinds), " |\n|", '---|' x (1 + @kinds), "\n";
print '| `', shift @$_, '` | ', join(' | ', @$_), " |\n" for sort { $a->[0] cmp $b->[0] } @table;
print "\nOf what passes without KSM $compared.\n";
print "\n| KSM | program and case | |\n|---|---|---|\n";
print map { s/^(\S+)\s+(.*): (.*)/| $1 | $2 | $3 |\n/r } @notes;
die "rksm does not pass more cases than the built-in\n" if $out{rksm} >= $out{'built-in'};
