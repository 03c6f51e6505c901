package httproute

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"slices"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// inPlace is the longest frame that is taken where it lies in what was read ahead.
const inPlace = 4 << 10

// frame is one frame, or a header list with all its frames.
type frame struct {
	http2.FrameHeader
	fields    fields      // of HEADERS
	truncated bool        // fields are not all, since there were too many
	data      []byte      // of DATA
	other     http2.Frame // if it is neither
}

// ended says whether its stream ends with it; the flag is the same bit for HEADERS and DATA.
func (f *frame) ended() bool { return f.Flags.Has(http2.FlagDataEndStream) }

// frameReader reads frames. Short DATA, and header lists in one short frame, are nearly all that a connection of small requests has: they are
// taken as they lie in the buffer. http2.Framer reads all others. It would take the short ones in the same way (FuzzFrames), with some
// allocations for each.
type frameReader struct {
	r    *bufio.Reader
	fr   *http2.Framer
	hdec *hpack.Decoder
	emit func(hpack.HeaderField)
	odd  bool // fr has found an error, and knows what may come next
	f    frame

	memory fields // for f.fields
	// of the list that is decoded:
	size    uint32
	regular bool // a field that is no pseudo field has come
	invalid bool
}

func newFrameReader(r *bufio.Reader) *frameReader {
	d := &frameReader{r: r, fr: http2.NewFramer(io.Discard, r), hdec: hpack.NewDecoder(4096, nil)}
	d.emit = d.field
	d.hdec.SetMaxStringLength(maxFields)
	d.fr.ReadMetaHeaders = d.hdec
	d.fr.MaxHeaderListSize = maxFields
	d.fr.SetMaxReadFrameSize(16 << 10)
	d.fr.SetReuseFrames()
	return d
}

// readFrame reads a frame. It is valid until the next call.
func (d *frameReader) readFrame() (*frame, error) {
	if ok, err := d.short(); ok || err != nil {
		return &d.f, err
	}
	f, err := d.fr.ReadFrame()
	if err != nil {
		d.odd = true
		return nil, err
	}
	d.f = frame{FrameHeader: f.Header()}
	switch f := f.(type) {
	case *http2.MetaHeadersFrame:
		d.f.fields, d.f.truncated = f.Fields, f.Truncated
	case *http2.DataFrame:
		d.f.data = f.Data()
	default:
		d.f.other = f
	}
	return &d.f, nil
}

// short reads the next frame if it is one to be taken in place.
func (d *frameReader) short() (bool, error) {
	b, err := d.r.Peek(frameHead)
	if err != nil || d.odd {
		return false, nil // fr finds the same
	}
	n := int(b[0])<<16 | int(b[1])<<8 | int(b[2])
	typ, flags, id := http2.FrameType(b[3]), http2.Flags(b[4]), binary.BigEndian.Uint32(b[5:])&(1<<31-1)
	var plain bool
	switch typ {
	case http2.FrameData:
		plain = !flags.Has(http2.FlagDataPadded)
	case http2.FrameHeaders:
		plain = flags.Has(http2.FlagHeadersEndHeaders) && !flags.Has(http2.FlagHeadersPadded) && (n >= priority || !flags.Has(http2.FlagHeadersPriority))
	default:
	}
	if !plain || id == 0 || n > inPlace {
		return false, nil
	}
	if b, err = d.r.Peek(frameHead + n); err != nil {
		return false, nil
	}
	payload := b[frameHead:]
	_, _ = d.r.Discard(len(b)) // cannot fail; the bytes stay where they are until the next read
	d.f = frame{FrameHeader: http2.FrameHeader{Type: typ, Flags: flags, Length: uint32(n), StreamID: id}}
	if typ == http2.FrameData {
		d.f.data = payload
		return true, nil
	}
	if flags.Has(http2.FlagHeadersPriority) {
		payload = payload[priority:]
	}
	return true, d.list(payload)
}

// frameHead and priority are lengths (RFC 9113, sections 4.1 and 6.2).
const frameHead, priority = 9, 5

// list decodes a header list.
func (d *frameReader) list(block []byte) error {
	d.f.fields, d.size, d.regular, d.invalid = d.memory[:0], 0, false, false
	d.hdec.SetEmitEnabled(true)
	d.hdec.SetEmitFunc(d.emit)
	_, err := d.hdec.Write(block)
	d.memory = d.f.fields
	if errors.Join(err, d.hdec.Close()) != nil {
		return http2.ConnectionError(http2.ErrCodeCompression)
	}
	if d.invalid || !validPseudo(d.f.fields) {
		return http2.StreamError{StreamID: d.f.StreamID, Code: http2.ErrCodeProtocol}
	}
	return nil
}

// field takes one field of a list. After one that is invalid or too much the decoder keeps its table, and no others come.
func (d *frameReader) field(f hpack.HeaderField) {
	switch {
	case !httpguts.ValidHeaderFieldValue(f.Value):
		d.invalid = true
	case f.IsPseudo():
		d.invalid = d.regular
	default:
		d.regular = true
		d.invalid = !validName(f.Name)
	}
	d.size += f.Size()
	d.f.truncated = !d.invalid && d.size > maxFields
	if d.invalid || d.f.truncated {
		d.hdec.SetEmitEnabled(false)
		return
	}
	d.f.fields = append(d.f.fields, f)
}

// validName says whether a name may be a field's (RFC 9113, section 8.2.1).
func validName(s string) bool {
	for i := range len(s) {
		if c := s[i]; c >= 'A' && c <= 'Z' || !httpguts.IsTokenRune(rune(c)) {
			return false
		}
	}
	return s != ""
}

// validPseudo says whether pseudo fields are known ones, of a request or of an answer, each once (RFC 9113, section 8.3).
func validPseudo(l fields) bool {
	var request, answer bool
	for i, f := range l {
		if !f.IsPseudo() {
			return true
		}
		switch f.Name {
		case ":method", ":path", ":scheme", ":authority", ":protocol":
			request = true
		case ":status":
			answer = true
		default:
			return false
		}
		if request && answer || slices.ContainsFunc(l[:i], func(g hpack.HeaderField) bool { return g.Name == f.Name }) {
			return false
		}
	}
	return true
}
