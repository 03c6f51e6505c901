package httproute

// maxChunkLine bounds a chunk's size with its extensions, and a trailer field.
const maxChunkLine = 8 << 10

// chunkScanner finds the end of a body in the chunked coding (RFC 9112, section 7.1) without changing a byte of it.
//
//	size ──CRLF──▶ data ──CRLF──▶ size … size 0 ──CRLF──▶ trailer ──empty line──▶ done
type chunkScanner struct {
	state chunkState
	left  int64 // of the chunk's data
	line  int   // bytes of the current line
	digit int   // digits of the size
}

type chunkState int

const (
	chunkSize     chunkState = iota // in the size's digits
	chunkExt                        // behind them
	chunkSizeLF                     // after the CR of that line
	chunkData                       // in the data
	chunkDataCR                     // at the CR after the data
	chunkDataLF                     // at the LF after it
	trailerStart                    // at the beginning of a trailer line
	trailerLine                     // in it
	trailerLF                       // after its CR
	chunkLastLF                     // after the CR of the empty line
	chunkFinished                   // done
)

// scan consumes bytes of b that belong to the body and returns how many; done says that it ends there. After errOdd the end cannot be known.
func (s *chunkScanner) scan(b []byte) (n int, done bool, err error) {
	for n < len(b) {
		if s.state == chunkData {
			k := min(s.left, int64(len(b)-n))
			n += int(k)
			if s.left -= k; s.left == 0 {
				s.state = chunkDataCR
			}
			continue
		}
		if err := s.step(b[n]); err != nil {
			return n, false, err
		}
		n++
		if s.state == chunkFinished {
			return n, true, nil
		}
	}
	return n, false, nil
}

// step takes one byte outside the data.
func (s *chunkScanner) step(c byte) error {
	if s.line++; s.line > maxChunkLine {
		return errOdd
	}
	switch s.state {
	case chunkSize:
		if v, ok := hex(c); ok && s.digit < 15 {
			s.digit++
			s.left = s.left<<4 | v
			return nil
		}
		switch {
		case s.digit == 0:
			return errOdd
		case c == '\r':
			s.state = chunkSizeLF
		case c == ';' || isBlank(c):
			s.state = chunkExt
		default:
			return errOdd
		}
	case chunkExt:
		if c == '\r' {
			s.state = chunkSizeLF
		} else if c < ' ' && c != '\t' {
			return errOdd
		}
	case chunkSizeLF:
		if c != '\n' {
			return errOdd
		}
		s.line, s.digit, s.state = 0, 0, chunkData
		if s.left == 0 {
			s.state = trailerStart
		}
	case chunkDataCR:
		s.state = chunkDataLF
		return oddIf(c != '\r')
	case chunkDataLF:
		s.line, s.state = 0, chunkSize
		return oddIf(c != '\n')
	case trailerStart:
		if c == '\r' {
			s.state = chunkLastLF
			return nil
		}
		s.state = trailerLine
		return oddIf(!isTchar(c)) // folding among others
	case trailerLine:
		if c == '\r' {
			s.state = trailerLF
		} else if c < ' ' && c != '\t' {
			return errOdd
		}
	case trailerLF:
		s.line, s.state = 0, trailerStart
		return oddIf(c != '\n')
	case chunkLastLF:
		s.state = chunkFinished
		return oddIf(c != '\n')
	case chunkData, chunkFinished:
	}
	return nil
}

func hex(c byte) (int64, bool) {
	switch {
	case '0' <= c && c <= '9':
		return int64(c - '0'), true
	case 'a' <= c && c <= 'f':
		return int64(c-'a') + 10, true
	case 'A' <= c && c <= 'F':
		return int64(c-'A') + 10, true
	}
	return 0, false
}
