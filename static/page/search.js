// The results of a search: times in the user's time zone, and live counts.

import { localise } from './format.js';
import { start as startLive } from './live.js';
import { showToastFor } from './toast.js';
import './shortcuts.js';
import './unread.js';

localise(document);
showToastFor(() => false);
startLive();
