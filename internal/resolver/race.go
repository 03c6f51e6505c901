package resolver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/miekg/dns"
)

// race is one query's way through the upstreams. An answer with what was asked for wins at once, whoever gives it. That there is nothing counts
// from an upstream only when those before it have answered or failed, or at the end: a lost datagram must not make a company's names unknown.
type race struct {
	*forwarder
	q       *query
	order   []*upstream
	results chan attempt
	asked   []attempt
	turns   int // in which an upstream was asked or left out
	pending int
	settled []bool   // by place in order: has answered or failed
	held    *attempt // says that there is nothing; of the most preferred that does
	refusal []byte   // an answer that is none; given to the client if nobody knows better
	errs    []error
}

// attempt is one upstream's part in a race.
type attempt struct {
	upstream *upstream
	place    int // in order
	started  time.Time
	answer   []byte
	err      error
}

// race asks the upstreams one after the other until one gives an answer that counts.
func (f *forwarder) race(ctx context.Context, q *query, order []*upstream) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the losers
	r := &race{forwarder: f, q: q, order: order, results: make(chan attempt, upstreamPasses*len(order)), settled: make([]bool, len(order))}
	r.next(ctx)
	timer := time.NewTimer(upstreamStagger)
	defer timer.Stop()
	for r.pending > 0 && ctx.Err() == nil {
		select {
		case a := <-r.results:
			r.pending--
			if winner := r.take(ctx, a); winner != nil {
				return r.won(*winner), nil
			}
			if r.turns < len(order) && r.held == nil { // a second pass is for lost datagrams only
				r.next(ctx)
				timer.Reset(upstreamStagger)
			}
		case <-timer.C:
			f.dropIdle(r.asked[len(r.asked)-1].upstream) // its sockets may be of a network that is gone
			if r.next(ctx) {
				timer.Reset(upstreamStagger)
			}
		case <-ctx.Done():
		}
	}
	switch {
	case r.held != nil:
		return r.won(*r.held), nil
	case r.refusal != nil:
		return r.refusal, nil
	}
	f.stats.upstreamErrors.Add(1)
	if ctx.Err() != nil {
		r.errs = append(r.errs, errors.New("no upstream resolver answered in time"))
	}
	if len(r.errs) == 0 {
		return nil, errClosed
	}
	return nil, errors.Join(r.errs...)
}

// next asks the upstream whose turn it is, and says whether there was one. Who could say no more than is held already is left out.
func (r *race) next(ctx context.Context) bool {
	for r.turns < upstreamPasses*len(r.order) {
		a := attempt{place: r.turns % len(r.order), started: time.Now()}
		a.upstream = r.order[a.place]
		r.turns++
		if r.held != nil && a.place >= r.held.place {
			continue
		}
		r.asked = append(r.asked, a)
		if r.spawn(func() {
			a.answer, a.err = r.exchange(ctx, a.upstream, r.q)
			r.results <- a
		}) {
			r.pending++
		}
		return true
	}
	return false
}

// take notes what an upstream says, and returns the attempt that has won, if one has.
func (r *race) take(ctx context.Context, a attempt) *attempt {
	if a.err != nil && ctx.Err() != nil {
		return nil // it did not fail: its time is over
	}
	r.settled[a.place] = true
	switch {
	case a.err != nil:
		r.setDown(a.upstream, true)
		r.errs = append(r.errs, fmt.Errorf("%s: %w", a.upstream.addr, a.err))
	case unhelpful(a.answer):
		if r.refusal == nil {
			r.refusal = a.answer
		}
	case !r.q.negative(a.answer):
		return &a
	case r.held == nil || a.place < r.held.place:
		r.held = &a
	}
	if r.held != nil && !r.awaits(r.held.place) {
		return r.held
	}
	return nil
}

// awaits says whether one before this place may still answer.
func (r *race) awaits(place int) bool {
	for _, s := range r.settled[:place] {
		if !s {
			return true
		}
	}
	return false
}

// won ends the race, and has those looked at that had their time and were silent.
func (r *race) won(winner attempt) []byte {
	r.setDown(winner.upstream, false)
	for _, a := range r.asked {
		if !r.settled[a.place] && time.Since(a.started) >= upstreamStagger {
			r.suspect(a.upstream, r.q, a.started)
		}
	}
	return winner.answer
}

// unhelpful names the codes on which the laptop's own resolver library goes on to its next server (res_send in glibc and others).
func unhelpful(answer []byte) bool {
	switch rcode(answer) {
	case dns.RcodeServerFailure, dns.RcodeNotImplemented, dns.RcodeRefused:
		return true
	}
	return false
}

// negative says whether an answer is that there is no such name, or nothing of this type (RFC 2308 section 2).
func (q *query) negative(answer []byte) bool {
	if q.opcode() != dns.OpcodeQuery || answer[2]&flagTC != 0 {
		return false
	}
	return rcode(answer) == dns.RcodeNameError || rcode(answer) == dns.RcodeSuccess && !q.answered(answer)
}

// answered says whether an answer has a record of the type that was asked for, and not only aliases on the way to it.
func (q *query) answered(answer []byte) bool {
	left := int(binary.BigEndian.Uint16(answer[6:])) // ANCOUNT
	found := false
	_ = records(answer, q.questionEnd(), func(_ int, rtype uint16) error {
		found = found || left > 0 && (rtype == q.qtype || q.qtype == dns.TypeANY)
		left--
		return nil
	})
	return found
}
