package mux

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/doppel-dev/doppel/internal/wire"
)

// sendErrLocked says why nothing can be sent, or nil.
func (st *Stream) sendErrLocked() error {
	switch {
	case st.err != nil:
		return st.err
	case st.closed:
		return net.ErrClosed
	case st.tx.fin:
		return io.ErrClosedPipe
	}
	return nil
}

// takeCredit waits until something may be sent and takes credit for up to n bytes of payload (for all n if whole). It
// returns how many payload bytes may be sent.
func (st *Stream) takeCredit(n int, whole bool) (int, error) {
	// Not for a few bytes: small credit would be spent on headers (RFC 1122, section 4.2.3.4: silly window syndrome).
	least := wire.HeaderLen + min(n, 512)
	if whole {
		least = wire.HeaderLen + n
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	for {
		if err := st.sendErrLocked(); err != nil {
			return 0, err
		}
		if st.writeDeadline.expired {
			return 0, errTimeout
		}
		if st.tx.credit >= least {
			if !whole {
				n = min(n, st.tx.credit-wire.HeaderLen, wire.FullPayload)
			}
			st.tx.credit -= wire.HeaderLen + n
			return n, nil
		}
		if !st.tx.wantSent {
			st.tx.wantSent = true
			st.mu.Unlock()
			err := st.sendWant(min(wire.HeaderLen+n, wire.MaxFrame))
			st.mu.Lock()
			if err != nil && st.err == nil {
				return 0, sessionError(err)
			}
			continue
		}
		st.writable.Wait()
	}
}

// sendWant tells the peer that n bytes, with their header, wait for credit. It goes behind the data that used the credit up.
func (st *Stream) sendWant(n int) error {
	var p [4]byte
	binary.BigEndian.PutUint32(p[:], uint32(n))
	return st.s.w.inOrder(true, &st.turn, wire.Header{Type: wire.TypeWant, Stream: st.id}, p[:])
}

// Write sends p and returns when all of it is queued or sent.
func (st *Stream) Write(p []byte) (int, error) {
	st.writeMu.Lock()
	defer st.unlockWrite()
	sent := 0
	for sent < len(p) {
		n, err := st.takeCredit(len(p)-sent, false)
		if err != nil {
			return sent, err
		}
		if err := st.send(0, p[sent:sent+n]); err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

// WritePacket sends p as one message of at most MaxPacket bytes; it may be empty. It waits while the peer grants no credit.
func (st *Stream) WritePacket(p []byte) error {
	if len(p) > MaxPacket {
		return ErrTooLarge
	}
	st.writeMu.Lock()
	defer st.unlockWrite()
	if _, err := st.takeCredit(len(p), true); err != nil {
		return err
	}
	return st.send(wire.FlagMessage, p)
}

// send queues one DATA frame for which credit was taken. writeMu is held.
func (st *Stream) send(flags uint8, p []byte) error {
	err := st.s.w.put(st, wire.Header{Type: wire.TypeData, Flags: flags, Stream: st.id}, p, nil)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errGivenUp):
		st.mu.Lock()
		defer st.mu.Unlock()
		st.tx.credit += wire.HeaderLen + len(p)
		return cmp.Or(st.sendErrLocked(), errTimeout)
	}
	return st.transportError(err)
}

// over reports whether a Write has to end.
func (st *Stream) over() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.err != nil || st.closed || st.writeDeadline.expired
}

// giveUp ends a Write that waits for its turn. It may be called with mu held.
func (st *Stream) giveUp() { st.s.w.giveUp(&st.turn) }

func (st *Stream) transportError(err error) error {
	if e := st.s.Err(); e != nil {
		err = e
	}
	return sessionError(err)
}

// ReadFrom sends what r returns until EOF; it saves io.Copy a buffer. While r is idle it holds a small buffer only.
func (st *Stream) ReadFrom(r io.Reader) (int64, error) {
	const least = 4 << 10
	var total int64
	for size := least; ; {
		buf := getChunk(size)
		n, err := r.Read(buf.b[:min(len(buf.b), wire.FullPayload)])
		if n > 0 {
			m, werr := st.Write(buf.b[:n])
			total += int64(m)
			if werr != nil {
				err = werr
			}
		}
		buf.recycle()
		switch {
		case err == io.EOF: //nolint:errorlint // io.Reader returns io.EOF itself
			return total, nil
		case err != nil:
			return total, err
		case n >= size-wire.HeaderLen:
			size = min(4*size, wire.MaxFrame)
		case n < size/4:
			size = max(size/4, least)
		}
	}
}

// onWindow takes credit that the peer granted.
func (st *Stream) onWindow(n uint32) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if int64(st.tx.credit)+int64(n) > wire.MaxCredit {
		return fmt.Errorf("%w: credit of stream %d overflows", wire.ErrProtocol, st.id)
	}
	st.tx.credit += int(n)
	st.tx.wantSent = false
	st.writable.Signal()
	return nil
}

// onReclaim gives unused credit back.
func (st *Stream) onReclaim(keep uint32) error {
	st.mu.Lock()
	n := st.tx.credit - int(min(keep, wire.MaxCredit))
	if n > 0 {
		st.tx.credit -= n
	}
	st.mu.Unlock()
	if n <= 0 {
		n = 0
	}
	return st.s.reply(func(b []byte) []byte { return wire.AppendUint32(b, wire.TypeReturn, st.id, uint32(n)) })
}
