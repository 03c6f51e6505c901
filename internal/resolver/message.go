package resolver

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/dns"
)

const (
	headerLen  = 12    // RFC 1035 section 4.1.1
	maxMessage = 65535 // what the length prefix of TCP can say
	maxName    = 255   // RFC 1035 section 2.3.4, on the wire
	minUDP     = 512   // RFC 1035 section 2.3.4, without EDNS0
	maxUDP     = 65507 // what one datagram of IPv4 can carry
	ourUDP     = 4096  // the UDP size we offer in our own OPT records
)

// The bytes of the header that the packet path reads and sets without a full parse.
const (
	flagQR = 0x80 // byte 2
	flagTC = 0x02
	flagRD = 0x01
	flagRA = 0x80 // byte 3
)

var (
	errNoAnswer = errors.New("not a query")     // must not be answered: too short, or itself an answer
	errFormat   = errors.New("malformed query") // answered with FORMERR
)

// query is one question of a client.
type query struct {
	raw     []byte // the client's message; never changed
	tcp     bool   // how the client asked
	name    string // the asked name in lower case, odd bytes escaped, no final dot
	nameEnd int    // raw[headerLen:nameEnd] is the name on the wire
	qtype   uint16
	qclass  uint16

	// set by the decision
	cluster    bool
	suffix     string // what the cluster's name has more than the asked one
	generation uint64 // of the cache, before the decision
	service    string // "svc.ns" if the name is a service's or below one
	session    string // of the cluster
	ask        Ask    // it, if not Config.Cluster
}

// parseQuery reads header and question. The other sections stay unread: for names outside they are none of our business.
func parseQuery(raw []byte, tcp bool) (*query, error) {
	if len(raw) < headerLen || raw[2]&flagQR != 0 {
		return nil, errNoAnswer
	}
	q := &query{raw: raw, tcp: tcp}
	if q.opcode() != dns.OpcodeQuery {
		return q, nil // an UPDATE or NOTIFY: the upstream knows
	}
	if binary.BigEndian.Uint16(raw[4:]) != 1 { // RFC 9619: exactly one question
		return nil, errFormat
	}
	var err error
	if q.name, q.nameEnd, err = readName(raw); err != nil {
		return nil, err
	}
	if len(raw) < q.nameEnd+4 {
		return nil, errFormat
	}
	q.qtype = binary.BigEndian.Uint16(raw[q.nameEnd:])
	q.qclass = binary.BigEndian.Uint16(raw[q.nameEnd+2:])
	return q, nil
}

// readName reads the question's name, which has nothing before it that it could point to.
func readName(raw []byte) (name string, end int, err error) {
	var buf [maxName]byte
	text := buf[:0]
	for off := headerLen; off < len(raw); {
		n := int(raw[off])
		if n == 0 {
			return string(text), off + 1, nil
		}
		if n > 63 || off+1+n >= len(raw) || off+1+n-headerLen >= maxName {
			return "", 0, errFormat
		}
		if len(text) > 0 {
			text = append(text, '.')
		}
		for _, c := range raw[off+1 : off+1+n] {
			switch {
			case c >= 'A' && c <= 'Z':
				text = append(text, c+'a'-'A')
			case c <= ' ' || c > '~' || c == '.' || c == '\\':
				text = fmt.Appendf(text, `\%03d`, c)
			default:
				text = append(text, c)
			}
		}
		off += 1 + n
	}
	return "", 0, errFormat
}

func (q *query) opcode() int { return int(q.raw[2]>>3) & 0xf }

// standard tells whether q is a plain question of class IN.
func (q *query) standard() bool { return q.nameEnd != 0 && q.qclass == dns.ClassINET }

// questionEnd is where the question ends in raw: the header's end if it was not read.
func (q *query) questionEnd() int {
	if q.nameEnd == 0 {
		return headerLen
	}
	return q.nameEnd + 4
}

// isAnswer tells whether msg answers q, sent with the given ID: without that check anybody who can send to our socket, or a late
// answer to an earlier question, could speak for the resolver.
func (q *query) isAnswer(msg []byte, id uint16) bool {
	if len(msg) < headerLen || binary.BigEndian.Uint16(msg) != id || msg[2]&flagQR == 0 || (msg[2]^q.raw[2])&0x78 != 0 {
		return false
	}
	if q.nameEnd == 0 {
		return true
	}
	if binary.BigEndian.Uint16(msg[4:]) == 0 { // some servers leave the question out of an error
		return rcode(msg) != dns.RcodeSuccess
	}
	end := q.questionEnd()
	return len(msg) >= end && equalFold(msg[headerLen:end], q.raw[headerLen:end])
}

// rcode is the answer's code without the upper bits of EDNS0.
func rcode(msg []byte) int { return int(msg[3] & 0xf) }

// equalFold compares names on the wire; the bytes of lengths are below those of letters.
func equalFold(a, b []byte) bool {
	return bytes.Equal(a, b) || bytes.Equal(lower(a), lower(b))
}

func lower(b []byte) []byte {
	out := bytes.Clone(b)
	for i, c := range out {
		if c >= 'A' && c <= 'Z' {
			out[i] = c + 'a' - 'A'
		}
	}
	return out
}

// opt is what matters of a query's EDNS0 record (RFC 6891).
type opt struct {
	present bool
	size    int // the client's UDP payload size
	version byte
	do      bool // DNSSEC OK
}

// edns reads the OPT record of q. It reads all sections, and so finds what parseQuery left.
func (q *query) edns() (opt, error) {
	var o opt
	err := records(q.raw, q.questionEnd(), func(at int, rtype uint16) error {
		if rtype != dns.TypeOPT {
			return nil
		}
		if o.present { // RFC 6891 section 6.1.1
			return errFormat
		}
		o = opt{
			present: true,
			size:    int(binary.BigEndian.Uint16(q.raw[at+2:])),
			version: q.raw[at+5],
			do:      q.raw[at+6]&0x80 != 0,
		}
		return nil
	})
	return o, err
}

// limit is how large an answer the client takes.
func (q *query) limit(o opt) int {
	if q.tcp {
		return maxMessage
	}
	return min(max(o.size, minUDP), maxUDP)
}

// records calls fn for each resource record behind the question, with the offset of its type field (the TTL stands at +4).
func records(msg []byte, off int, fn func(at int, rtype uint16) error) error {
	n := 0
	for i := 6; i < headerLen; i += 2 {
		n += int(binary.BigEndian.Uint16(msg[i:]))
	}
	for range n {
		at, err := skipName(msg, off)
		if err != nil {
			return err
		}
		if len(msg) < at+10 {
			return errFormat
		}
		off = at + 10 + int(binary.BigEndian.Uint16(msg[at+8:]))
		if len(msg) < off {
			return errFormat
		}
		if err := fn(at, binary.BigEndian.Uint16(msg[at:])); err != nil {
			return err
		}
	}
	return nil
}

func skipName(msg []byte, off int) (int, error) {
	for off < len(msg) {
		switch n := int(msg[off]); {
		case n == 0:
			return off + 1, nil
		case n >= 0xc0: // RFC 1035 section 4.1.4: a pointer ends the name
			return off + 2, nil
		case n > 63:
			return 0, errFormat
		default:
			off += 1 + n
		}
	}
	return 0, errFormat
}

// fqdnQuery builds the question for the cluster: q's name with its suffix, and an OPT record. It fails for names that are too
// long to exist.
func (q *query) fqdnQuery(id uint16, do bool) ([]byte, error) {
	msg := make([]byte, headerLen, headerLen+maxName+4+11)
	binary.BigEndian.PutUint16(msg, id)
	msg[2] = flagRD
	msg[5] = 1 // QDCOUNT
	msg = append(msg, lower(q.raw[headerLen:q.nameEnd-1])...)
	for label := range bytes.SplitSeq([]byte(q.suffix), []byte{'.'}) {
		if len(label) > 63 {
			return nil, errNameTooLong
		}
		if len(label) > 0 {
			msg = append(append(msg, byte(len(label))), label...)
		}
	}
	msg = append(msg, 0)
	if len(msg)-headerLen > maxName {
		return nil, errNameTooLong
	}
	msg = binary.BigEndian.AppendUint16(msg, q.qtype)
	msg = binary.BigEndian.AppendUint16(msg, q.qclass)
	return appendOPT(msg, opt{do: do}, 0, nil), nil
}

// fqdn is the name the cluster knows, without the final dot.
func (q *query) fqdn() string {
	if q.suffix == "" {
		return q.name
	}
	return q.name + "." + q.suffix
}

// appendOPT adds our OPT record; ext are the upper bits of the response code.
func appendOPT(msg []byte, o opt, ext byte, data []byte) []byte {
	binary.BigEndian.PutUint16(msg[10:], binary.BigEndian.Uint16(msg[10:])+1)
	var do byte
	if o.do {
		do = 0x80 // RFC 3225: the bit is copied
	}
	msg = append(msg, 0, 0, byte(dns.TypeOPT), ourUDP>>8, ourUDP&0xff, ext, 0, do, 0)
	msg = binary.BigEndian.AppendUint16(msg, uint16(len(data)))
	return append(msg, data...)
}

// replyEDNS builds an answer without records, with an OPT record and its data if the client sent one (RFC 6891 section 7).
func (q *query) replyEDNS(rcode int, o opt, data []byte) []byte {
	msg := append(make([]byte, 0, 512), q.raw[:q.questionEnd()]...)
	msg[2] = flagQR | q.raw[2]&(0x78|flagRD)
	msg[3] = flagRA | byte(rcode&0xf)
	clear(msg[4:headerLen])
	if q.nameEnd != 0 {
		msg[5] = 1
	}
	if !o.present {
		return msg
	}
	return appendOPT(msg, o, byte(rcode>>4), data)
}

// failure answers SERVFAIL and, to who speaks EDNS0, why (RFC 8914).
func (q *query) failure(cause error) []byte {
	o, err := q.edns()
	if err != nil {
		return formErr(q.raw)
	}
	code := dns.ExtendedErrorCodeNetworkError
	if errors.Is(cause, errNoUpstream) || errors.Is(cause, errBusy) {
		code = dns.ExtendedErrorCodeNotReady
	}
	text := "doppel: " + strings.ReplaceAll(cause.Error(), "\n", "; ")
	text = text[:min(len(text), 200)]
	data := binary.BigEndian.AppendUint16(nil, dns.EDNS0EDE)
	data = binary.BigEndian.AppendUint16(data, uint16(2+len(text)))
	data = binary.BigEndian.AppendUint16(data, code)
	return q.replyEDNS(dns.RcodeServerFailure, o, append(data, text...))
}

// badVersion answers a query whose EDNS version is not 0 (RFC 6891 section 6.1.3: BADVERS is 16).
func (q *query) badVersion(o opt) []byte {
	return q.replyEDNS(dns.RcodeBadVers, o, nil)
}

// formErr answers a message of which nothing but the header may be right.
func formErr(raw []byte) []byte {
	msg := make([]byte, headerLen)
	copy(msg, raw[:2])
	msg[2] = flagQR | raw[2]&(0x78|flagRD)
	msg[3] = flagRA | dns.RcodeFormatError
	return msg
}
